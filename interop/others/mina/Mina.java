import java.io.*;
import java.net.*;
import java.nio.file.Path;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;
import org.apache.sshd.client.ClientBuilder;
import org.apache.sshd.client.SshClient;
import org.apache.sshd.client.channel.*;
import org.apache.sshd.client.keyverifier.AcceptAllServerKeyVerifier;
import org.apache.sshd.client.session.ClientSession;
import org.apache.sshd.common.NamedFactory;
import org.apache.sshd.common.cipher.BuiltinCiphers;
import org.apache.sshd.common.kex.*;
import org.apache.sshd.common.keyprovider.FileKeyPairProvider;
import org.apache.sshd.common.mac.BuiltinMacs;
import org.apache.sshd.common.session.*;
import org.apache.sshd.common.signature.BuiltinSignatures;
import org.apache.sshd.common.util.net.SshdSocketAddress;
import org.apache.sshd.core.CoreModuleProperties;

/**
 * Usage: java Mina PORT USER KEY... Its standard input has a line "KEX HOSTKEY CIPHER MAC" for each further connection.
 */
public class Mina {
  static int port;
  static String user;

  public static void main(String[] args) throws Exception {
    port = Integer.parseInt(args[0]);
    user = args[1];
    for (String key : Arrays.copyOfRange(args, 2, args.length)) {
      try (Connection c = new Connection(client(), key)) {
        c.command(new byte[0]);
        System.out.println(key + ": " + c.algorithms());
      }
    }
    String key = args[2];
    try (Connection c = new Connection(client(), key)) {
      c.command(random(64 << 20));
      c.forward(random(8 << 20));
      check(c.exchanges.get() == 1, "an unexpected key exchange");
    }
    SshClient rekeying = client();
    CoreModuleProperties.REKEY_BYTES_LIMIT.set(rekeying, 1L << 20);
    CoreModuleProperties.REKEY_BLOCKS_LIMIT.set(rekeying, 0L);
    try (Connection c = new Connection(rekeying, key)) {
      c.command(random(64 << 20));
      c.forward(random(8 << 20));
      c.command(random(10));
      System.out.println(c.exchanges + " key exchanges");
      check(c.exchanges.get() > 20, c.exchanges + " key exchanges");
    }
    for (String line : new BufferedReader(new InputStreamReader(System.in)).lines().toList()) {
      String[] want = line.split(" ");
      SshClient client = client();
      client.setKeyExchangeFactories(
          NamedFactory.setUpTransformedFactories(false, List.of(BuiltinDHFactories.fromFactoryName(want[0])), ClientBuilder.DH2KEX));
      client.setSignatureFactories(List.of(BuiltinSignatures.fromFactoryName(want[1]), BuiltinSignatures.ed25519));
      client.setCipherFactories(List.of(BuiltinCiphers.fromFactoryName(want[2])));
      client.setMacFactories(List.of(BuiltinMacs.fromFactoryName(want[3])));
      try (Connection c = new Connection(client, key)) {
        c.command(random(1 << 20));
        String got = c.algorithms();
        // An AEAD cipher has no MAC beside it.
        check(got.equals(line) || got.endsWith("-gcm@openssh.com aead") && line.startsWith(got.replace(" aead", " ")), "got " + got);
        System.out.println(line);
      } catch (Throwable e) {
        throw new Exception(line, e);
      }
    }
    System.exit(0);
  }

  static SshClient client() {
    SshClient client = SshClient.setUpDefaultClient();
    client.setServerKeyVerifier(AcceptAllServerKeyVerifier.INSTANCE);
    client.setHostConfigEntryResolver(org.apache.sshd.client.config.hosts.HostConfigEntryResolver.EMPTY);
    // Left out by default.
    client.setKeyExchangeFactories(
        NamedFactory.setUpTransformedFactories(true, BuiltinDHFactories.VALUES, ClientBuilder.DH2KEX));
    return client;
  }

  static byte[] random(int n) {
    byte[] b = new byte[n];
    new Random(n).nextBytes(b);
    return b;
  }

  static void check(boolean ok, String message) {
    if (!ok) throw new AssertionError(message);
  }

  static class Connection implements AutoCloseable {
    final SshClient client;
    final ClientSession session;
    final AtomicInteger exchanges = new AtomicInteger();

    Connection(SshClient client, String key) throws Exception {
      this.client = client;
      client.addSessionListener(
          new SessionListener() {
            public void sessionEvent(Session session, Event event) {
              if (event == Event.KeyEstablished) exchanges.incrementAndGet();
            }
          });
      client.start();
      session = client.connect(user, "127.0.0.1", port).verify(Duration.ofSeconds(60)).getSession();
      session.setKeyIdentityProvider(new FileKeyPairProvider(Path.of(key)));
      session.auth().verify(Duration.ofSeconds(60));
    }

    String algorithms() {
      List<String> names = new ArrayList<>();
      for (KexProposalOption o :
          List.of(KexProposalOption.ALGORITHMS, KexProposalOption.SERVERKEYS, KexProposalOption.C2SENC, KexProposalOption.C2SMAC))
        names.add(session.getNegotiatedKexParameter(o));
      return String.join(" ", names);
    }

    /** Sends data through a command, and expects it back, with a line on stderr and an exit status. */
    void command(byte[] data) throws Exception {
      try (ChannelExec exec = session.createExecChannel("cat; echo err >&2; exit 7")) {
        ByteArrayOutputStream err = new ByteArrayOutputStream();
        exec.setErr(err);
        exec.open().verify(Duration.ofSeconds(60));
        echoed(data, exec.getInvertedIn(), exec.getInvertedOut());
        exec.waitFor(EnumSet.of(ClientChannelEvent.CLOSED), Duration.ofSeconds(60));
        check(Objects.equals(exec.getExitStatus(), 7), "exit status " + exec.getExitStatus());
        check(err.toString().equals("err\n"), "stderr: " + err);
      }
    }

    /** The same through a channel to a local server. */
    void forward(byte[] data) throws Exception {
      try (ServerSocket server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
        CompletableFuture.runAsync(
            () -> {
              try (Socket s = server.accept()) {
                s.getInputStream().transferTo(s.getOutputStream());
              } catch (IOException e) {
                throw new UncheckedIOException(e);
              }
            });
        SshdSocketAddress to = new SshdSocketAddress("127.0.0.1", server.getLocalPort());
        try (ChannelDirectTcpip channel = session.createDirectTcpipChannel(new SshdSocketAddress("127.0.0.1", 1), to)) {
          channel.open().verify(Duration.ofSeconds(60));
          echoed(data, channel.getInvertedIn(), channel.getInvertedOut());
        }
      }
    }

    void echoed(byte[] data, OutputStream to, InputStream from) throws Exception {
      CompletableFuture<Void> sent =
          CompletableFuture.runAsync(
              () -> {
                try (to) {
                  to.write(data);
                } catch (IOException e) {
                  throw new UncheckedIOException(e);
                }
              });
      byte[] back = from.readAllBytes();
      sent.get(60, TimeUnit.SECONDS);
      check(Arrays.equals(back, data), back.length + " bytes came back of " + data.length + ", or others");
    }

    public void close() throws IOException {
      session.close(false).await(Duration.ofSeconds(10));
      client.stop();
    }
  }
}
