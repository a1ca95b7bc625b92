<?php
// Usage: php phpseclib.php HOST PORT USER KEY. Prints the output of a command, and its exit status.
require 'phpseclib3/autoload.php';
[, $host, $port, $user, $key] = $argv;
$ssh = new phpseclib3\Net\SSH2($host, (int) $port);
if (!$ssh->login($user, phpseclib3\Crypt\PublicKeyLoader::load(file_get_contents($key)))) {
    exit("no login\n");
}
$out = $ssh->exec('echo hello; exit 3');
echo trim($out), ' status ', $ssh->getExitStatus(), "\n";
