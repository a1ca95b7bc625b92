// Run by hand. "cargo run --release -- PORT USER KEY... <SUITES" runs it against a gateway with clients/lib.sh's gateway_of_all_algorithms.
// Usage: client PORT USER KEY... Its standard input has a line "KEX HOSTKEY CIPHER MAC" for each further connection.
use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use russh::keys::{load_secret_key, Algorithm, PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{client, cipher, kex, mac, Channel, ChannelMsg, Disconnect, Limits, Names};
use tokio::net::TcpListener;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

#[derive(Clone, Default)]
struct Events {
    exchanges: Arc<AtomicUsize>,
    algorithms: Arc<Mutex<String>>,
}

impl client::Handler for Events {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> std::result::Result<bool, russh::Error> {
        Ok(true)
    }

    async fn kex_done(&mut self, _: Option<&[u8]>, n: &Names, _: &mut client::Session) -> std::result::Result<(), russh::Error> {
        self.exchanges.fetch_add(1, SeqCst);
        *self.algorithms.lock().unwrap() =
            format!("{} {} {} {}", n.kex.as_ref(), n.key, n.cipher.as_ref(), n.client_mac.as_ref());
        Ok(())
    }
}

struct Connection {
    session: client::Handle<Events>,
    events: Events,
}

impl Connection {
    async fn new(port: u16, user: &str, key: &str, config: client::Config) -> Result<Connection> {
        let events = Events::default();
        let mut session = client::connect(Arc::new(config), ("127.0.0.1", port), events.clone()).await?;
        let hash = session.best_supported_rsa_hash().await?.flatten();
        let key = PrivateKeyWithHashAlg::new(Arc::new(load_secret_key(key, None)?), hash);
        check(session.authenticate_publickey(user, key).await?.success(), "the key is not accepted")?;
        Ok(Connection { session, events })
    }

    /// Sends data through a command, and expects it back, with a line on stderr and an exit status.
    async fn command(&self, data: &[u8]) -> Result<()> {
        let channel = self.session.channel_open_session().await?;
        channel.exec(true, "cat; echo err >&2; exit 7").await?;
        let (err, status) = echoed(channel, data).await?;
        check(status == Some(7) && err == b"err\n", &format!("status {status:?}, stderr {err:?}"))
    }

    /// The same through a channel to a server of ours.
    async fn forward(&self, data: &[u8]) -> Result<()> {
        let server = TcpListener::bind("127.0.0.1:0").await?;
        let port = server.local_addr()?.port();
        let echo = tokio::spawn(async move {
            let (mut socket, _) = server.accept().await?;
            let (mut from, mut to) = socket.split();
            tokio::io::copy(&mut from, &mut to).await
        });
        let channel = self.session.channel_open_direct_tcpip("127.0.0.1", port.into(), "127.0.0.1", 1).await?;
        echoed(channel, data).await?;
        echo.await??;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        Ok(self.session.disconnect(Disconnect::ByApplication, "", "").await?)
    }
}

/// Sends data, and EOF, and expects it back. Returns what came on stderr and the exit status.
async fn echoed(channel: Channel<client::Msg>, data: &[u8]) -> Result<(Vec<u8>, Option<u32>)> {
    let (mut from, to) = channel.split();
    let send = async {
        to.data(data).await?;
        to.eof().await
    };
    let receive = async {
        let (mut out, mut err, mut status) = (Vec::new(), Vec::new(), None);
        while let Some(message) = from.wait().await {
            match message {
                ChannelMsg::Data { data } => out.extend_from_slice(&data),
                ChannelMsg::ExtendedData { data, .. } => err.extend_from_slice(&data),
                ChannelMsg::ExitStatus { exit_status } => status = Some(exit_status),
                _ => {}
            }
        }
        (out, err, status)
    };
    let (sent, (out, err, status)) = tokio::join!(send, receive);
    sent?;
    check(out == data, &format!("{} bytes came back of {}, or others", out.len(), data.len()))?;
    Ok((err, status))
}

fn check(ok: bool, message: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(message.into()) }
}

async fn random(n: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; n];
    tokio::task::spawn_blocking(move || {
        use std::io::Read;
        std::fs::File::open("/dev/urandom")?.read_exact(&mut data)?;
        Ok(data)
    })
    .await?
}

fn config(line: &str) -> Result<client::Config> {
    let want: Vec<_> = line.split(' ').collect();
    let unknown = |_| format!("an algorithm of {line} is unknown");
    let mut config = client::Config::default();
    config.preferred.kex = vec![
        kex::Name::try_from(want[0]).map_err(unknown)?,
        kex::EXTENSION_SUPPORT_AS_CLIENT,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    ]
    .into();
    config.preferred.key = vec![want[1].parse::<Algorithm>()?].into();
    config.preferred.cipher = vec![cipher::Name::try_from(want[2]).map_err(unknown)?].into();
    config.preferred.mac = vec![mac::Name::try_from(want[3]).map_err(unknown)?].into();
    Ok(config)
}

async fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (port, user, keys) = (args[1].parse()?, &args[2], &args[3..]);
    for key in keys {
        let c = Connection::new(port, user, key, Default::default()).await?;
        c.command(b"").await?;
        println!("{key}: {}", c.events.algorithms.lock().unwrap());
        c.close().await?;
    }
    let rekeying = client::Config { limits: Limits::new(1 << 20, 1 << 20, Duration::from_secs(3600)), ..Default::default() };
    for (config, least) in [(client::Config::default(), 1), (rekeying, 20)] {
        let c = Connection::new(port, user, &keys[0], config).await?;
        c.command(&random(64 << 20).await?).await?;
        c.forward(&random(8 << 20).await?).await?;
        c.command(b"again").await?;
        let exchanges = c.events.exchanges.load(SeqCst);
        println!("{exchanges} key exchanges");
        check(exchanges >= least, "too few")?;
        c.close().await?;
    }
    for line in std::io::read_to_string(std::io::stdin())?.lines() {
        let c = Connection::new(port, user, &keys[0], config(line)?).await.map_err(|e| format!("{line}: {e}"))?;
        c.command(&random(1 << 20).await?).await.map_err(|e| format!("{line}: {e}"))?;
        let got = c.events.algorithms.lock().unwrap().clone();
        check(got == line, &format!("want {line}, got {got}"))?;
        c.close().await?;
        println!("{line}");
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    tokio::time::timeout(Duration::from_secs(240), run()).await?
}
