package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// The far end of a forward is a separate process, this program started with
// peerArg, so that its CPU time is not measured. A connection to it begins with
// one byte, download or upload, and the number of bytes as a big-endian uint64.
const (
	peerArg  = "peer"
	download = 'd' // send that many bytes, then close
	upload   = 'u' // take that many bytes, then answer with one
)

// chunk is the number of bytes per system call of the peer and the client's end.
const chunk = 1 << 20

func (b *bench) startPeer() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self, peerArg)
	cmd.Stdout = w
	_, err = b.spawn("peer", cmd)
	w.Close()
	if err != nil {
		return err
	}
	if _, err := fmt.Fscanln(r, &b.peer); err != nil {
		return fmt.Errorf("the peer did not print its address: %w\n%s", err, b.logOf("peer"))
	}
	return nil
}

// servePeer prints its address on standard output, and serves until its listener
// fails.
func servePeer() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		// Ends with its connection, or when bench.close kills the process.
		go func() {
			defer conn.Close()
			var head [9]byte
			if _, err := io.ReadFull(conn, head[:]); err != nil {
				return
			}
			n := int64(binary.BigEndian.Uint64(head[1:]))
			if head[0] == download {
				produce(conn, n)
			} else if consume(conn, n) == nil {
				conn.Write([]byte{0})
			}
		}()
	}
}

// produce writes n zero bytes. Their value does not matter, because ssh does not
// compress by default.
func produce(conn net.Conn, n int64) error {
	buf := make([]byte, chunk)
	for n > 0 {
		k, err := conn.Write(buf[:min(n, chunk)])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

// consume reads n bytes and drops them inside the kernel, without copying them
// (tcp(7), MSG_TRUNC).
func consume(conn net.Conn, n int64) error {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, chunk)
	for n > 0 {
		var k int
		var recvErr error
		err := raw.Read(func(fd uintptr) bool {
			k, _, recvErr = unix.Recvfrom(int(fd), buf[:min(n, chunk)], unix.MSG_TRUNC)
			return recvErr != unix.EAGAIN
		})
		if err := errors.Join(err, recvErr); err != nil {
			return err
		}
		if k == 0 {
			return io.ErrUnexpectedEOF
		}
		n -= int64(k)
	}
	return nil
}

// A cost is the time of one transfer.
type cost struct {
	wall, server, client float64 // seconds, wall and CPU
}

// transfers sends data through ssh -L in both directions. The CPU time is that
// of the server that terminates the client's connection: the gateway alone, or
// all processes of sshd. The throughput is of the whole path. The goals are
// against sshd with the cipher that it negotiates with a stock client. The speed
// of that cipher depends on the machine, so sshd is measured with the gateway's
// cipher, too.
func (b *bench) transfers(ctx context.Context) ([]row, error) {
	servers := []server{b.sshd, b.sshdGCM, b.gateway}
	ciphers := map[string]string{}
	costs := map[string]map[byte][]cost{}
	for _, s := range servers {
		cipher, err := b.ciphers(ctx, s)
		if err != nil {
			return nil, err
		}
		ciphers[s.name], costs[s.name] = cipher, map[byte][]cost{}
	}
	for round := range b.rounds {
		for _, s := range servers {
			c, err := b.forward(ctx, s)
			if err != nil {
				return nil, fmt.Errorf("forward through %s: %w", s.name, err)
			}
			for way, cost := range c {
				costs[s.name][way] = append(costs[s.name][way], cost)
				b.log.Info("transfer", "round", round+1, "server", s.name, "way", string(way),
					"server_cpu", cost.server, "client_cpu", cost.client, "wall", cost.wall)
			}
		}
	}
	gib := float64(b.size) / (1 << 30)
	pick := func(s server, way byte, f func(cost) float64) (out samples) {
		for _, c := range costs[s.name][way] {
			out = append(out, f(c))
		}
		return out
	}
	cpu := func(c cost) float64 { return c.server / gib }
	speed := func(c cost) float64 { return gib * 1024 / c.wall }
	var rows []row
	for _, r := range []struct {
		what, goal, unit string
		way              byte
		of               func(cost) float64
	}{
		{"server CPU per GiB through -L, download", "<= 0.45 x", "s/GiB", download, cpu},
		{"server CPU per GiB through -L, upload", "<= 0.70 x", "s/GiB", upload, cpu},
		{"throughput through -L, download", ">= 1.2 x", "MiB/s", download, speed},
		{"throughput through -L, upload", ">= 1.1 x", "MiB/s", upload, speed},
		{"client CPU per GiB through -L, download", "", "s/GiB", download, func(c cost) float64 { return c.client / gib }},
		{"client CPU per GiB through -L, upload", "", "s/GiB", upload, func(c cost) float64 { return c.client / gib }},
	} {
		ours := pick(b.gateway, r.way, r.of)
		for _, s := range []server{b.sshd, b.sshdGCM} {
			made := row{
				What: r.what, Goal: r.goal, Unit: r.unit, Sallyport: ours, SSHD: pick(s, r.way, r.of),
				Note: fmt.Sprintf("%s against %s", ciphers[b.gateway.name], ciphers[s.name]),
			}
			if s.name == b.sshdGCM.name {
				made.What, made.Goal = r.what+", same cipher", ""
			}
			rows = append(rows, made)
		}
	}
	return rows, nil
}

// forward opens a connection with a forward to the peer, and sends b.size bytes
// each way through it.
func (b *bench) forward(ctx context.Context, s server) (map[byte]cost, error) {
	local, err := freeAddr()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client := b.ssh(ctx, s, "-N", "-o", "ExitOnForwardFailure=yes", "-L", local+":"+b.peer)
	client.Stderr = os.Stderr
	if err := client.Start(); err != nil {
		return nil, err
	}
	defer client.Wait()
	defer cancel()

	serverCPU := treeCPUSeconds
	if s.name == b.gateway.name {
		serverCPU = cpuSeconds // its children are bastions
	}
	transfer := func(way byte, n int64) (cost, error) {
		conn, err := dialPatiently(ctx, local)
		if err != nil {
			return cost{}, err
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		server0, err1 := serverCPU(s.pid)
		client0, err2 := cpuSeconds(client.Process.Pid)
		began := time.Now()
		_, err3 := conn.Write(binary.BigEndian.AppendUint64([]byte{way}, uint64(n)))
		if err := errors.Join(err1, err2, err3); err != nil {
			return cost{}, err
		}
		if way == download {
			err = consume(conn, n)
		} else if err = produce(conn, n); err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1))
		}
		wall := time.Since(began)
		server1, err1 := serverCPU(s.pid)
		client1, err2 := cpuSeconds(client.Process.Pid)
		return cost{wall.Seconds(), server1 - server0, client1 - client0}, errors.Join(err, err1, err2)
	}
	costs := map[byte]cost{}
	for _, way := range []byte{download, upload} {
		if _, err := transfer(way, min(b.size, 16<<20)); err != nil { // warm up
			return nil, err
		}
		if costs[way], err = transfer(way, b.size); err != nil {
			return nil, err
		}
	}
	return costs, nil
}

// dialPatiently dials addr until a listener accepts, until ctx ends, or for 20 s.
func dialPatiently(ctx context.Context, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
