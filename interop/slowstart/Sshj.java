import java.io.*;
import net.schmizz.sshj.SSHClient;
import net.schmizz.sshj.connection.channel.direct.Session;
import net.schmizz.sshj.transport.verification.PromiscuousVerifier;

/** Usage: java Sshj HOST PORT USER KEY. Prints the output of a command, and its exit status. */
public class Sshj {
  public static void main(String[] args) throws Exception {
    SSHClient client = new SSHClient();
    client.addHostKeyVerifier(new PromiscuousVerifier());
    client.connect(args[0], Integer.parseInt(args[1]));
    client.authPublickey(args[2], args[3]);
    Session session = client.startSession();
    Session.Command command = session.exec("cat; exit 3");
    try (OutputStream in = command.getOutputStream()) {
      in.write("hello\n".getBytes());
    }
    String out = new String(command.getInputStream().readAllBytes()) + new String(command.getErrorStream().readAllBytes());
    command.join();
    System.out.println(out.trim() + " status " + command.getExitStatus());
    client.disconnect();
  }
}
