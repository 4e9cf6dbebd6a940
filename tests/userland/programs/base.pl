# Regular expressions, sorting, numbers and their text, pack, processes.
use strict;
use warnings;

my $seed = 60;
sub number { $seed = ($seed * 1103515245 + 12345) % 2147483648; return $seed }

my @words = map { join '', map { chr(97 + number() / 7 % 26) } 0 .. number() / 7 % 9 } 1 .. 20000;
my $text = join ' ', @words;
my %count;
$count{$_}++ for $text =~ /[aeiou][^aeiou ]+/g;
my @top = sort { $count{$b} <=> $count{$a} || $a cmp $b } keys %count;
print "$_ $count{$_}\n" for @top[0 .. 20];
print scalar(() = $text =~ /\b(\w)\w*\1\b/g), "\n";
(my $changed = $text) =~ s/(\w+) (\w+)/\u$2 $1/g;
print unpack('%32C*', $changed), ' ', length $changed, "\n";
print join(',', (sort { $a <=> $b } map { number() } 1 .. 2000)[0 .. 5]), "\n";
for my $value (1 / 3, 1e21, -2.5, 2**60, 1e-7, 9**40) {
	printf "%s %.15g %e %d %x\n", $value, $value, $value, $value % 1000, abs($value) % 65536;
}
printf "%.12f %.12f %.12f %.12f\n", sin(1e5), cos(2), atan2(1, -3), exp(log(10) * 2.5);
print unpack('H*', pack('nNvVCa5w/a*d>', 1, 2, 3, 4, 5, 'six', 'seven', 8.5)), "\n";
my $sum = 0;
$sum = ($sum * 31 + ord) % 1000000007 for split //, $text;
print "$sum\n";
print 0xffffffff * 0xffffffff, ' ', 18446744073709551615 / 3, ' ', 7 <=> 8, ' ', ~0 >> 3, "\n";

pipe my $reader, my $writer or die;
my $child = fork // die;
if ($child == 0) { close $reader; print $writer "from the child\n" x 3; close $writer; exit 9 }
close $writer;
print <$reader>;
waitpid $child, 0;
print $? >> 8, "\n";
my $alarms = 0;
local $SIG{ALRM} = sub { $alarms++ };
alarm 1;
select undef, undef, undef, 0.1 until $alarms;
print "alarm $alarms\n";
eval { die { code => 5 } };
print "caught $@->{code}\n";
print `echo sub shell; exit 3`, $? >> 8, "\n";
