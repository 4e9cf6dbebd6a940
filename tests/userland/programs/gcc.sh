# Compiles with several options; the objects and what they print are always the same.
set -e
cd /tmp
for options in -O0 -O2 "-O3 -funroll-loops" "-Os -m64 -fno-pie -no-pie" "-O2 -mfpmath=387" "-O3 -mavx2"; do
	gcc $options -ffp-contract=off -Wall -c -o program.o /cases/program.c
	gcc $options -o program program.o -lm -lpthread
	echo "$options: $(openssl dgst -sha256 -r program.o) $(openssl dgst -sha256 -r program)"
	case $options in
	*avx2*)
		# Vector code gives what scalar code gave; it only runs where the CPU has it.
		busybox grep -q ' avx2 ' /proc/cpuinfo || continue
		./program | busybox cmp - expected ;;
	-O3*) ./program | tee expected ;;
	*) ./program ;;
	esac
done
gcc -static -O2 -o program /cases/program.c -lm
./program
gcc -O2 -S -o - /cases/program.c | openssl dgst -sha256
echo 'int main(void) { return undeclared; }' | gcc -x c - 2>&1 || echo "gcc: $?"
