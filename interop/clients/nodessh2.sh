# Node's ssh2, unmodified: commands, sftp, a shell, TCP and Unix sockets forwarded both ways, no more sessions. It rejects some
# of these with servers that do not identify as OpenSSH.
. "$CLIENTS/lib.sh"
npm install --silent --no-audit --no-fund --no-save --prefix . ssh2@1.17.0
cat >client.js <<'EOF'
const { Client } = require('ssh2'), fs = require('fs'), net = require('net'), assert = require('assert');
const { HOST, PORT, USER_NAME, KEY } = process.env;
const client = new Client();
const call = (name, ...args) => new Promise((ok, fail) => client[name](...args, (err, result) => err ? fail(err) : ok(result)));
const read = (stream) => new Promise((ok) => { let s = ''; stream.on('data', (d) => { s += d; }).on('end', () => ok(s)); });
const echo = (socket) => socket.pipe(socket);

async function main() {
  let stream = await call('exec', 'cat; echo err >&2; exit 7');
  const status = new Promise((ok) => stream.on('exit', ok));
  stream.end('in');
  assert.deepEqual(await Promise.all([read(stream), read(stream.stderr), status]), ['in', 'err\n', 7]);

  stream = await call('shell');
  stream.end('exit 4\n');
  stream.resume();
  assert.equal(await new Promise((ok) => stream.on('exit', ok)), 4);

  const sftp = await call('sftp');
  const op = (name, ...args) => new Promise((ok, fail) => sftp[name](...args, (err, result) => err ? fail(err) : ok(result)));
  const dir = process.cwd();
  await op('writeFile', dir + '/file', 'content');
  await op('symlink', dir + '/file', dir + '/link');
  assert.equal(fs.readlinkSync('link'), dir + '/file');
  assert.equal(String(await op('readFile', dir + '/link')), 'content');
  sftp.end();

  // Forwards to the bastion, and from it: the account is the one that runs this.
  const target = net.createServer(echo).listen(dir + '/target');
  stream = await call('openssh_forwardOutStreamLocal', dir + '/target');
  stream.end('out through a socket');
  assert.equal(await read(stream), 'out through a socket');
  target.close();
  const tcp = net.createServer(echo).listen(0, '127.0.0.1');
  await new Promise((ok) => tcp.on('listening', ok));
  stream = await call('forwardOut', '127.0.0.1', 1, '127.0.0.1', tcp.address().port);
  stream.end('out through TCP');
  assert.equal(await read(stream), 'out through TCP');
  tcp.close();

  client.on('unix connection', (info, accept) => echo(accept()));
  await call('openssh_forwardInStreamLocal', dir + '/listen');
  let socket = net.connect(dir + '/listen');
  socket.end('in through a socket');
  assert.equal(await read(socket), 'in through a socket');
  await call('openssh_unforwardInStreamLocal', dir + '/listen');
  client.on('tcp connection', (info, accept) => echo(accept()));
  const port = await call('forwardIn', '127.0.0.1', 0);
  socket = net.connect(port, '127.0.0.1');
  socket.end('in through TCP');
  assert.equal(await read(socket), 'in through TCP');
  await call('unforwardIn', '127.0.0.1', port);

  await call('openssh_noMoreSessions');
  await assert.rejects(call('exec', 'true'));
  client.end();
}

client.on('ready', () => main().catch((err) => { console.error(err); process.exit(1); }));
client.on('error', (err) => { console.error(err); process.exit(1); });
client.connect({ host: HOST, port: PORT, username: USER_NAME, privateKey: fs.readFileSync(KEY) });
EOF
node client.js
