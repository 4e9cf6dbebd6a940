# Perl's own modules: large numbers, hashes, encodings, threads, time.
use strict;
use warnings;
use threads;
use Digest::SHA qw(sha256_hex sha512_base64);
use Encode qw(decode encode);
use List::Util qw(reduce shuffle sum);
use Math::BigFloat;
use Math::BigInt;
use MIME::Base64;
use POSIX qw(fmod floor strftime);
use Storable qw(freeze thaw);

print Math::BigInt->new(3)->bpow(500), "\n";
print Math::BigInt->new(120)->bfac() / Math::BigInt->new(118)->bfac(), "\n";
print Math::BigFloat->new(2)->bsqrt(60), ' ', Math::BigFloat->bpi(80), "\n";
print sha256_hex('x' x 100000), ' ', sha512_base64('tetra'), "\n";
my $text = decode('UTF-8', "gr\xc3\xbc\xc3\x9fe \xe2\x82\xac");
print length $text, ' ', encode_base64(encode('UTF-16BE', $text));
print fmod(1e10, 7.3), ' ', floor(-2.5), ' ', strftime('%F %T %j', gmtime 1234567890), "\n";
my $data = thaw(freeze({ list => [1 .. 5], hash => { a => 1 } }));
print "@{$data->{list}} $data->{hash}{a}\n";
print sum(map { $_->join } map { my $n = $_; threads->create(sub { sum map { $_ * $n } 1 .. 1000 }) } 1 .. 4), "\n";
print reduce { $a * 3 % 1009 + $b } 1 .. 10000;
print "\n";
