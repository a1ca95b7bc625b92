package wire

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestExchangeVersions(t *testing.T) {
	long := "SSH-2.0-" + strings.Repeat("x", 245)
	tests := []struct {
		name, sent, want, told string
	}{
		{"OpenSSH", "SSH-2.0-OpenSSH_9.2p1 Debian-2\r\nrest", "SSH-2.0-OpenSSH_9.2p1 Debian-2", ""},
		{"no CR", "SSH-2.0-x\nrest", "SSH-2.0-x", ""},
		{"1.99", "SSH-1.99-x\r\nrest", "SSH-1.99-x", ""},
		{"longest", long + "\r\nrest", long, ""},
		{"too long", long + "x\r\nrest", "", "Invalid SSH identification string.\r\n"},
		{"version 1", "SSH-1.5-x\r\n", "", "Protocol major versions differ.\r\n"},
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", "", "Invalid SSH identification string.\r\n"},
		{"TLS", "\x16\x03\x01\x02\x00", "", "Invalid SSH identification string.\r\n"},
		{"blank line first", "\r\nSSH-2.0-x\r\n", "", "Invalid SSH identification string.\r\n"},
		{"a bare newline", "\n", "", "Invalid SSH identification string.\r\n"},
		{"hang up", "SSH-2", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, server := tcpPair(t)
			c := New(server)
			io.WriteString(client, tt.sent)
			if tt.name == "hang up" {
				client.(*net.TCPConn).CloseWrite()
			}
			got, err := c.ExchangeVersions("SSH-2.0-Test")
			if got != tt.want || (err != nil) != (tt.want == "") {
				t.Fatalf("ExchangeVersions = %q, %v; want %q", got, err, tt.want)
			}
			if tt.told != "" && !errors.Is(err, ErrVersion) {
				t.Errorf("error is %v, want ErrVersion", err)
			}
			if tt.want != "" {
				// What package ssh does next: it writes its version, and
				// reads the client's, byte by byte.
				if n, err := c.Write([]byte("SSH-2.0-Test\r\n")); n != 14 || err != nil {
					t.Fatal(n, err)
				}
				c.Write([]byte("next"))
				want := tt.sent
				buf := make([]byte, len(want))
				for i := range buf {
					if _, err := io.ReadFull(c, buf[i:i+1]); err != nil {
						t.Fatal(err)
					}
				}
				if string(buf) != want {
					t.Errorf("package ssh would read %q, want %q", buf, want)
				}
			}
			c.Close()
			told, _ := io.ReadAll(client)
			want := "SSH-2.0-Test\r\n" + tt.told
			if tt.want != "" {
				want += "next"
			}
			if string(told) != want {
				t.Errorf("client read %q, want %q", told, want)
			}
		})
	}
}

func FuzzExchangeVersions(f *testing.F) {
	f.Add([]byte("SSH-2.0-OpenSSH_9.2\r\n\x00\x00\x01"))
	f.Add([]byte("SSH-1.99-x\n"))
	f.Add([]byte("GET / HTTP/1.0\r\n\r\n"))
	f.Add(bytes.Repeat([]byte("SSH-2.0-"), 40))
	f.Fuzz(func(t *testing.T, sent []byte) {
		client, server := net.Pipe()
		defer client.Close()
		go io.Copy(io.Discard, client)
		go func() { client.Write(sent); client.Close() }()
		c := New(server)
		defer c.Close()
		version, err := c.ExchangeVersions("SSH-2.0-Test")
		if err == nil && (!bytes.HasPrefix(sent, []byte(version)) || len(version) > versionMax) {
			t.Errorf("made %q of %q", version, sent)
		}
	})
}

// TestBytes sends pieces of all sizes both ways at once, as package ssh does
// and otherwise, and wants every byte in its place.
func TestBytes(t *testing.T) {
	for _, kind := range []string{"tcp", "pipe"} {
		t.Run(kind, func(t *testing.T) {
			a, b := net.Pipe()
			if kind == "tcp" {
				a, b = tcpPair(t)
			}
			ca, cb := New(a), New(b)
			var wg sync.WaitGroup
			for i, c := range []*Conn{ca, cb} {
				wg.Go(func() {
					for n, rng := 0, newPieces(i); n < 400; n++ {
						if _, err := c.Write(rng.next()); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			for i, c := range []*Conn{cb, ca} {
				wg.Go(func() {
					buf := make([]byte, 200_000)
					for n, rng := 0, newPieces(i); n < 400; n++ {
						want := rng.next()
						if _, err := io.ReadFull(c, buf[:len(want)]); err != nil {
							t.Error(err)
							return
						}
						if !bytes.Equal(buf[:len(want)], want) {
							t.Errorf("piece %d of %d bytes differs", n, len(want))
							return
						}
					}
				})
			}
			wg.Wait()
			for _, c := range []*Conn{ca, cb} {
				if c.reader.buf != nil || c.reader.ahead != nil {
					t.Error("an idle connection holds a read buffer")
				}
				c.writer.mu.Lock()
				if c.writer.unsent != nil {
					t.Error("an idle connection holds a write buffer")
				}
				c.writer.mu.Unlock()
			}
		})
	}
}

// pieces makes the same pieces for the one who sends and the one who checks.
type pieces struct{ rng *rand.Rand }

func newPieces(seed int) pieces { return pieces{rand.New(rand.NewPCG(1, uint64(seed)))} }

func (p pieces) next() []byte {
	b := make([]byte, []int{1, 4, 52, pieceSize, pieceSize - 1, 28*1024 + 7, 32 * 1024, 100_000}[p.rng.IntN(8)])
	start := byte(p.rng.Uint32())
	for i := range b {
		b[i] = start + byte(i*7)
	}
	return b
}

// TestClose wants what was written before Close to arrive, and Close not to
// wait for ever for a peer that does not read.
func TestClose(t *testing.T) {
	client, server := tcpPair(t)
	c := New(server)
	want := bytes.Repeat([]byte("0123456789abcdef"), pieceSize/16)
	c.Write(want)
	c.Write([]byte("end"))
	go c.Close()
	got, err := io.ReadAll(client)
	if err != nil || string(got) != string(want)+"end" {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, len(want)+3)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("Write after Close worked")
	}

	_, server = tcpPair(t) // whose client does not read
	c = New(server)
	blocked := make(chan error)
	go func() {
		for {
			if _, err := c.Write(make([]byte, 32<<10)); err != nil {
				blocked <- err
				return
			}
		}
	}()
	time.Sleep(50 * time.Millisecond)
	c.Close()
	if err := <-blocked; err == nil {
		t.Error("a blocked Write survived Close")
	}
}

// TestWriteError wants an error in sending to reach the writer.
func TestWriteError(t *testing.T) {
	client, server := tcpPair(t)
	client.(*net.TCPConn).SetLinger(0)
	client.Close()
	c := New(server)
	for i := 0; ; i++ {
		if _, err := c.Write(make([]byte, pieceSize)); err != nil {
			break
		}
		if i > 10000 {
			t.Fatal("writes to a closed connection go on working")
		}
	}
	if n, err := c.Read(make([]byte, 10)); n != 0 || err == nil {
		t.Errorf("Read = %d, %v; want an error", n, err)
	}
}

func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}
