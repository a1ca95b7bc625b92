import com.jcraft.jsch.*;
import java.io.*;

/** Usage: java Jsch HOST PORT USER KEY. Prints the output of a command, and its exit status. */
public class Jsch {
  public static void main(String[] args) throws Exception {
    JSch jsch = new JSch();
    jsch.addIdentity(args[3]);
    Session session = jsch.getSession(args[2], args[0], Integer.parseInt(args[1]));
    session.setConfig("StrictHostKeyChecking", "no");
    session.connect();
    ChannelExec channel = (ChannelExec) session.openChannel("exec");
    channel.setCommand("cat; exit 3");
    channel.setInputStream(new ByteArrayInputStream("hello\n".getBytes()));
    channel.setErrStream(System.out, true);
    InputStream in = channel.getInputStream();
    channel.connect();
    String out = new String(in.readAllBytes()).trim();
    while (!channel.isClosed()) Thread.sleep(50);
    System.out.println(out + " status " + channel.getExitStatus());
    session.disconnect();
  }
}
