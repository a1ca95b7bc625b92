package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pires/go-proxyproto"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// An addressed connection says who it is from.
type addressed struct {
	net.Conn
	remote *net.TCPAddr
}

func (a addressed) RemoteAddr() net.Addr { return a.remote }
func (a addressed) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 22} }

// dialFrom connects from an address, and has the gateway serve the connection.
func (w *world) dialFrom(ctx context.Context, ip string) (near net.Conn, served <-chan struct{}) {
	near, far := sshtest.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.srv.ServeConn(ctx, addressed{far, &net.TCPAddr{IP: net.ParseIP(ip), Port: 4711}})
	}()
	return near, done
}

// loginOn logs in on a connection that has been made.
func loginOn(nc net.Conn, user string, keys ...ssh.Signer) (*client, error) {
	conn, chans, reqs, err := ssh.NewClientConn(nc, "gateway", &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(keys...)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	})
	if err != nil {
		return nil, err
	}
	return &client{Client: ssh.NewClient(conn, chans, reqs)}, nil
}

func (w *world) logged() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.log.String()
}

const balancer = "10.0.0.5"

func newProxiedWorld(t testing.TB) *world {
	w := newWorld(t)
	w.srv.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")}
	return w
}

// v2 returns a header of version 2.
func v2(command proxyproto.ProtocolVersionAndCommand, from, to net.Addr, tlvs ...proxyproto.TLV) string {
	h := proxyproto.HeaderProxyFromAddrs(2, from, to)
	h.Command = command
	if err := h.SetTLVs(tlvs); err != nil {
		panic(err)
	}
	text, err := h.Format()
	if err != nil {
		panic(err)
	}
	return string(text)
}

var (
	far4, near4 = &net.TCPAddr{IP: net.IPv4(203, 0, 113, 7), Port: 5000}, &net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 22}
	far6, near6 = &net.TCPAddr{IP: net.ParseIP("2001:db8::7"), Port: 5000}, &net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 22}
)

// TestProxied logs in through balancers, and from elsewhere.
func TestProxied(t *testing.T) {
	for _, tt := range []struct {
		name, from, header string
		client, server     string // what the login is from and to
	}{
		{"version 1", balancer, "PROXY TCP4 203.0.113.7 198.51.100.1 5000 22\r\n", "203.0.113.7:5000", "198.51.100.1:22"},
		{"version 1, IPv6", "fd00::5", "PROXY TCP6 2001:db8::7 2001:db8::1 5000 22\r\n", "[2001:db8::7]:5000", "[2001:db8::1]:22"},
		{"version 1, IPv4 in IPv6", balancer, "PROXY TCP6 ::ffff:203.0.113.7 ::ffff:198.51.100.1 5000 22\r\n", "203.0.113.7:5000", "198.51.100.1:22"},
		{"version 1, unknown", balancer, "PROXY UNKNOWN\r\n", balancer + ":4711", "10.0.0.9:22"},
		{"version 2", balancer, v2(proxyproto.PROXY, far4, near4), "203.0.113.7:5000", "198.51.100.1:22"},
		{"version 2, IPv6", balancer, v2(proxyproto.PROXY, far6, near6), "[2001:db8::7]:5000", "[2001:db8::1]:22"},
		{"version 2 with more", balancer, v2(proxyproto.PROXY, far4, near4, proxyproto.TLV{Type: 0xea, Value: bytes.Repeat([]byte("x"), 3000)}), "203.0.113.7:5000", "198.51.100.1:22"},
		{"version 2, local", balancer, v2(proxyproto.LOCAL, far4, near4), balancer + ":4711", "10.0.0.9:22"},
		{"a balancer seen through IPv6", "::ffff:" + balancer, v2(proxyproto.PROXY, far4, near4), "203.0.113.7:5000", "198.51.100.1:22"},
		{"nobody's balancer", "10.0.1.5", "", "10.0.1.5:4711", "10.0.0.9:22"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newProxiedWorld(t)
				nc, served := w.dialFrom(t.Context(), tt.from)
				// In pieces, which TCP may make of it.
				half := len(tt.header) / 2
				io.WriteString(nc, tt.header[:half])
				time.Sleep(time.Second)
				io.WriteString(nc, tt.header[half:])
				c, err := loginOn(nc, "alice", w.alice)
				if err != nil {
					t.Fatalf("%v\n%s", err, w.logged())
				}
				if out, err := c.run("who"); out != "I am alice" || err != nil {
					t.Errorf("run = %q, %v", out, err)
				}
				c.Close()
				<-served
				if id := w.dials[0]; id.Client.String() != tt.client || id.Server.String() != tt.server {
					t.Errorf("from %s to %s, want %s to %s", id.Client, id.Server, tt.client, tt.server)
				}
				if !strings.Contains(w.logged(), "remote="+tt.client) && !strings.Contains(w.logged(), `remote="`+tt.client) && tt.from != "::ffff:"+balancer {
					t.Errorf("the log does not name the client:\n%s", w.logged())
				}
			})
		})
	}
}

// TestNotProxied has balancers and strangers send what they must not.
func TestNotProxied(t *testing.T) {
	for _, tt := range []struct {
		name, from, sent string
		told, logged     string
		after            time.Duration // until it is cut off
	}{
		{"a header from a stranger", "203.0.113.7", "PROXY TCP4 10.0.0.1 10.0.0.2 1 22\r\nSSH-2.0-x\r\n", "Invalid SSH identification string", "not an SSH 2 client", 0},
		{"a header of version 2 from a stranger", "203.0.113.7", v2(proxyproto.PROXY, far4, near4) + "SSH-2.0-x\r\n", "Invalid SSH identification string", "not an SSH 2 client", 0},
		{"none", balancer, "SSH-2.0-x\r\n", "must begin with a PROXY protocol header", "no PROXY protocol header came first", 0},
		{"too late", balancer, "", "must begin with a PROXY protocol header", "did not come in time", proxyHeaderTimeout},
		{"too late for the rest", balancer, "PROXY TCP4 1.2", "must begin", "did not come in time", proxyHeaderTimeout},
		{"not version 1", balancer, "PROXY TCP5 1.2.3.4 1.2.3.5 1 2\r\n", "must begin", "not a PROXY protocol header", 0},
		{"no address", balancer, "PROXY TCP4 localhost 1.2.3.5 1 2\r\n", "must begin", "not a PROXY protocol header", 0},
		{"no port", balancer, "PROXY TCP4 1.2.3.4 1.2.3.5 70000 2\r\n", "must begin", "not a PROXY protocol header", 0},
		{"endless", balancer, "PROXY TCP4 " + strings.Repeat("1", 200), "must begin", "its line is too long", 0},
		{"not version 2", balancer, "\r\n\r\n\x00\r\nQUIX\n\x21\x11\x00\x00", "must begin", "no PROXY protocol header", 0},
		{"huge", balancer, proxyV2 + "\x21\x11\xff\xff", "must begin", "65535 bytes", 0},
		{"not TCP", balancer, v2(proxyproto.PROXY, &net.UDPAddr{IP: far4.IP, Port: 1}, &net.UDPAddr{IP: near4.IP, Port: 2}), "must begin", "not about a TCP connection", 0},
		{"unix", balancer, v2(proxyproto.PROXY, &net.UnixAddr{Net: "unix", Name: "/a"}, &net.UnixAddr{Net: "unix", Name: "/b"}), "must begin", "not about a TCP connection", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newProxiedWorld(t)
				began := time.Now()
				nc, served := w.dialFrom(t.Context(), tt.from)
				io.WriteString(nc, tt.sent)
				told, _ := io.ReadAll(nc)
				<-served
				if !strings.Contains(string(told), tt.told) || !strings.Contains(w.logged(), tt.logged) || len(w.dials) > 0 {
					t.Errorf("it was told %q; the log:\n%s", told, w.logged())
				}
				if took := time.Since(began); took != tt.after {
					t.Errorf("cut off after %v, want %v", took, tt.after)
				}
			})
		})
	}
}

// TestBalancerLooksIn is a balancer that sees whether the gateway is there: no
// reason to say anything.
func TestBalancerLooksIn(t *testing.T) {
	for name, header := range map[string]string{
		"nothing": "", "version 1": "PROXY UNKNOWN\r\n", "version 2": v2(proxyproto.LOCAL, far4, near4), "version 2, bare": proxyV2 + "\x20\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newProxiedWorld(t)
				nc, served := w.dialFrom(t.Context(), balancer)
				io.WriteString(nc, header)
				if header != "" { // it can see that this is SSH
					greeting := make([]byte, 8)
					if _, err := io.ReadFull(nc, greeting); err != nil || string(greeting) != "SSH-2.0-" {
						t.Errorf("it read %q, %v", greeting, err)
					}
				}
				nc.Close()
				<-served
				if w.logged() != "" {
					t.Errorf("logged:\n%s", w.logged())
				}
			})
		})
	}
}

// TestProxyHeadersWaitedFor is a balancer that opens connections and sends
// nothing on them. They are bounded, and keep nobody else out.
func TestProxyHeadersWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newProxiedWorld(t)
		w.srv.MaxStartups = Startups{3, 100, 3}
		for range 3 {
			nc, _ := w.dialFrom(t.Context(), balancer)
			defer nc.Close()
		}
		synctest.Wait()
		nc, served := w.dialFrom(t.Context(), balancer)
		defer nc.Close()
		<-served
		if !strings.Contains(w.logged(), "waiting for PROXY protocol headers: 3 connections") {
			t.Errorf("the fourth was waited for too:\n%s", w.logged())
		}
		direct, _ := w.dialFrom(t.Context(), "192.0.2.1")
		c, err := loginOn(direct, "alice", w.alice)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		time.Sleep(proxyHeaderTimeout)
		synctest.Wait()
		nc, _ = w.dialFrom(t.Context(), balancer)
		io.WriteString(nc, v2(proxyproto.PROXY, far4, near4))
		if c, err = loginOn(nc, "alice", w.alice); err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

// TestProxyHeaderAndDrain stops the gateway while a header is waited for.
func TestProxyHeaderAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newProxiedWorld(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		nc, served := w.dialFrom(ctx, balancer)
		defer nc.Close()
		time.Sleep(time.Second)
		began := time.Now()
		cancel(errDraining)
		<-served
		if time.Since(began) > 0 || w.logged() != "" {
			t.Errorf("after %v; the log:\n%s", time.Since(began), w.logged())
		}
	})
}

// TestSourcesBehindBalancer counts half-open connections by who is behind the
// balancer, not by the balancer.
func TestSourcesBehindBalancer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newProxiedWorld(t)
		w.srv.PerSourceMaxStartups = 1
		greeted := func(source string) bool {
			nc, _ := w.dialFrom(t.Context(), balancer)
			t.Cleanup(func() { nc.Close() })
			fmt.Fprintf(nc, "PROXY TCP4 %s 198.51.100.1 5000 22\r\n", source)
			greeting := make([]byte, 4)
			io.ReadFull(nc, greeting)
			return string(greeting) == "SSH-"
		}
		if !greeted("203.0.113.1") || greeted("203.0.113.1") || !greeted("203.0.113.2") {
			t.Error("sources are not told apart")
		}
		w.srv.startups.mu.Lock()
		defer w.srv.startups.mu.Unlock()
		if n := w.srv.startups.source[netip.MustParsePrefix(balancer+"/32")]; n != 0 {
			t.Errorf("%d connections count for the balancer", n)
		}
	})
}

func FuzzProxyHeader(f *testing.F) {
	for _, s := range []string{
		"", "PROXY UNKNOWN\r\n", "PROXY UNKNOWN ffff::1 ffff::2 1 2\r\nSSH-2.0-x\r\n", "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\nrest", "PROXY TCP6 ::1 ::2 1 2\r\n", "PROXY TCP6 fe80::1%eth0 ::2 1 2\r\n",
		"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n", "PROXY \n", "SSH-2.0-OpenSSH_9.2\r\n", proxyV2, proxyV2 + "\x20\x00\x00\x00rest", proxyV2 + "\x21\x13\x00\x0cabcdefghijkl",
		v2(proxyproto.PROXY, far4, near4) + "SSH-2.0-x\r\n", v2(proxyproto.PROXY, far6, near6), v2(proxyproto.LOCAL, far4, near4),
		v2(proxyproto.PROXY, &net.UDPAddr{IP: far4.IP}, &net.UDPAddr{IP: near4.IP}), v2(proxyproto.PROXY, far4, near4, proxyproto.TLV{Type: 4, Value: []byte("x")}),
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		in := bytes.NewReader(data)
		raw, err := readProxyHeader(in)
		// Nothing may be lost, and nothing may be read that is not the header.
		if rest, _ := io.ReadAll(in); !bytes.Equal(append(bytes.Clone(raw), rest...), data) {
			t.Fatalf("%q and %q are not %q", raw, rest, data)
		}
		if len(raw) > 16+proxyHeaderMax {
			t.Fatalf("read %d bytes", len(raw))
		}
		if err != nil {
			return
		}
		h, err := parseProxyHeader(raw)
		if err != nil {
			if !errors.Is(err, errProxyHeader) {
				t.Fatal(err)
			}
			return
		}
		if !h.Command.IsLocal() && (!addrPort(h.SourceAddr).IsValid() || !addrPort(h.DestinationAddr).IsValid() || addrPort(h.SourceAddr).Addr().Is4In6()) {
			t.Fatalf("%q: from %v to %v", raw, h.SourceAddr, h.DestinationAddr)
		}
		// The library is the judge of where a header ends.
		var again bytes.Buffer
		if _, err := h.WriteTo(&again); err != nil {
			t.Fatalf("%q cannot be written again: %v", raw, err)
		}
	})
}
