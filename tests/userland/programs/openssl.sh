# Hashes, ciphers and signatures whose result is always the same.
set -e
cd /tmp
i=0
while [ $i -lt 3000 ]; do echo "line $i of the input"; i=$((i + 1)); done >data
for hash in md5 sha1 sha224 sha256 sha384 sha512 sha3-256 blake2s256 shake128 ripemd160; do
	openssl dgst -$hash data
done
openssl dgst -sha256 -hmac key data
key=00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff
iv=0123456789abcdef0123456789abcdef
for cipher in aes-128-cbc aes-192-cfb aes-256-ctr aes-256-cbc aes-128-ofb camellia-256-cbc \
	chacha20 aria-128-ctr; do
	case $cipher in *-128-*) k=${key%????????????????????????????????} ;;
	*-192-*) k=${key%????????????????} ;;
	*) k=$key ;; esac
	openssl enc -$cipher -K $k -iv $iv -in data -out packed
	openssl enc -d -$cipher -K $k -iv $iv -in packed -out again
	busybox cmp data again
	echo "$cipher $(openssl dgst -sha256 -r packed)"
done
openssl enc -aes-256-cbc -pbkdf2 -iter 2000 -S 0011223344556677 -pass pass:word -in data -out packed
openssl dgst -sha256 packed
python3 /cases/rsakey.py key.der
openssl rsa -inform DER -in key.der -check -noout
openssl rsa -inform DER -in key.der -pubout -out public.pem
openssl rsa -inform DER -in key.der -out key.pem
openssl dgst -sha256 -sign key.pem -out signature data
openssl dgst -sha256 signature
openssl dgst -sha256 -verify public.pem -signature signature data
echo more >>data
if openssl dgst -sha256 -verify public.pem -signature signature data 2>/dev/null; then exit 1; fi
# What has a random number in it is only checked by its inverse.
openssl ecparam -name prime256v1 -genkey -noout -out ec.pem
openssl ec -in ec.pem -pubout -out ec-public.pem
openssl dgst -sha512 -sign ec.pem -out signature data
openssl dgst -sha512 -verify ec-public.pem -signature signature data
openssl genpkey -algorithm ed25519 -out ed.pem
openssl pkeyutl -sign -inkey ed.pem -rawin -in data -out signature
openssl pkeyutl -verify -inkey ed.pem -rawin -in data -sigfile signature
