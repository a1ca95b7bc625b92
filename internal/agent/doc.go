// Package agent is the SSH server inside a bastion.
//
// Only gateways log in to it, with certificates of their fleet (package sshca) that name
// the user and carry her permissions. After the login it behaves as OpenSSH's sshd does:
// sessions with and without a terminal, sftp, and forwarding of TCP ports, Unix sockets,
// the ssh-agent and X11.
//
// # One connection
//
// A connection is served in this order; the files are in the same order.
//
//	server.go   Serve accepts the connection, handshake authenticates the gateway
//	conn.go     conn.run reads global requests and channel opens, in order
//	session.go  a session channel: one terminal and one process; output.go copies its output
//	            and reports its exit status
//	forward.go  forwarding that the client opens; listen.go and x11.go: remote, agent and X11
//
// # When the bastion ends
//
// [Server.Serve] returns, and the bastion ends with it, in four cases (lifetime.go):
//
//   - No gateway has been connected for [Server.Idle]. The timer stops when a gateway has
//     authenticated, and starts again when the last connection closes. Processes that
//     clients have left behind do not count.
//   - The bastion has run for [Server.MaxLife].
//   - A gateway whose ledger does not have this bastion has asked it to stop, with the
//     global request stop-if-unused@sallyport, and had the only connection.
//   - The context ends, because the process was told to stop.
//
// Serve first shows a message on all terminals, if there are connections. In the last case it also leaves connections open for most of
// [Server.StopTimeout]. Then it sends SIGHUP, and SIGKILL after 5 seconds, to the process
// group of every session, reports the exit statuses to the clients, and closes the
// connections.
//
// # Which account a session runs as
//
// Everything on a connection runs as one account, [Server.Account].
// [Server.LookupLogin] looks it up again at each login, so that a connection gets the
// current groups, shell and resource limits; or a denial, which each session shows.
//
// An agent that runs as root runs nothing of the user's as root. It has two ways to switch
// the account:
//
//   - A program is started through package runas: [Login.start] in process.go.
//   - A socket, or an operation on a file, needs no process. Account.impersonate in
//     account.go switches the credentials of one thread.
//
// # After a client has disconnected
//
// As with sshd, the processes of a session continue when their client disconnects. A
// terminal is hung up, so processes that do not ignore SIGHUP end. Pipes are closed, so a
// process gets an end of file when it reads and SIGPIPE when it writes. The server, not the
// connection, owns processes (Server.processes): they end with the bastion. Only a process
// that has left its process group, with setsid(2), is not killed then; where the bastion
// is a container it ends with that. Listeners, forwarded connections, and the sockets of
// the ssh-agent and X11 end with the connection.
package agent
