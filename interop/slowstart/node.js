// Usage: node node.js HOST PORT USER KEY. Prints the output of a command, with its exit status, and the number
// of bytes that a shell on a terminal printed before it did what was typed.
const { Client } = require('ssh2');
const [host, port, username, key] = process.argv.slice(2);
const client = new Client();
client.on('error', (err) => { console.log('error:', err.message); process.exit(1); });
client.on('ready', () => client.exec('cat; exit 3', (err, stream) => {
  if (err) { console.log('exec:', err.message); process.exit(1); }
  let out = '';
  stream.on('data', (data) => { out += data; }).stderr.on('data', (data) => { out += data; });
  stream.on('close', (status) => {
    console.log(out.trimEnd(), 'status', status);
    client.end();
  });
  stream.end('hello\n');
}));
client.connect({ host, port, username, privateKey: require('fs').readFileSync(key) });
