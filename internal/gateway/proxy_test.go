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

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

const balancer = "10.0.0.5"

func newProxiedGateway(t testing.TB) *testGateway {
	gw := newTestGateway(t)
	gw.srv.ProxyProtocolFrom = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")}
	return gw
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

// TestProxied logs in through load balancers, and from other addresses.
func TestProxied(t *testing.T) {
	for _, tt := range []struct {
		name, from, header string
		client, server     string // addresses of the login
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
				gw := newProxiedGateway(t)
				nc, served := gw.dialFrom(t.Context(), tt.from)
				// In two segments.
				half := len(tt.header) / 2
				io.WriteString(nc, tt.header[:half])
				time.Sleep(time.Second)
				io.WriteString(nc, tt.header[half:])
				c, err := loginOn(nc, "alice", gw.alice)
				if err != nil {
					t.Fatalf("%v\n%s", err, gw.logged())
				}
				if out, err := c.run("who"); out != "I am alice" || err != nil {
					t.Errorf("run = %q, %v", out, err)
				}
				c.Close()
				<-served
				if id := gw.dials[0]; id.Client.String() != tt.client || id.Server.String() != tt.server {
					t.Errorf("from %s to %s, want %s to %s", id.Client, id.Server, tt.client, tt.server)
				}
				if !strings.Contains(gw.logged(), "remote="+tt.client) && !strings.Contains(gw.logged(), `remote="`+tt.client) && tt.from != "::ffff:"+balancer {
					t.Errorf("the log does not name the client:\n%s", gw.logged())
				}
			})
		})
	}
}

// TestProxiedLogIsLimited: lines in the operator's log count for LogPerUser, also if the
// client is behind a load balancer.
func TestProxiedLogIsLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newProxiedGateway(t)
		gw.srv.LogPerUser = LogLimit{Bytes: 1 << 20, Per: time.Hour}
		nc, served := gw.dialFrom(t.Context(), balancer)
		io.WriteString(nc, v2(proxyproto.PROXY, far4, near4))
		c, err := loginOn(nc, "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		<-served
		if gw.srv.budgets.get("alice", gw.srv.LogPerUser).used == 0 {
			t.Errorf("no line was counted:\n%s", gw.logged())
		}
	})
}

// TestNotProxied sends missing and invalid headers, and headers from other addresses.
func TestNotProxied(t *testing.T) {
	for _, tt := range []struct {
		name, from, sent string
		told, logged     string
		after            time.Duration // until it is closed
	}{
		{"a header from a stranger", "203.0.113.7", "PROXY TCP4 10.0.0.1 10.0.0.2 1 22\r\nSSH-2.0-x\r\n", "Invalid SSH identification string", "not an SSH 2 peer", 0},
		{"a header of version 2 from a stranger", "203.0.113.7", v2(proxyproto.PROXY, far4, near4) + "SSH-2.0-x\r\n", "Invalid SSH identification string", "not an SSH 2 peer", 0},
		{"none", balancer, "SSH-2.0-x\r\n", "must begin with a PROXY protocol header", "no PROXY protocol header, although", 0},
		{"too late", balancer, "", "must begin with a PROXY protocol header", "timeout while waiting for the PROXY", proxyHeaderTimeout},
		{"too late for the rest", balancer, "PROXY TCP4 1.2", "must begin", "timeout while waiting for the PROXY", proxyHeaderTimeout},
		{"not version 1", balancer, "PROXY TCP5 1.2.3.4 1.2.3.5 1 2\r\n", "must begin", "invalid PROXY protocol header", 0},
		{"no address", balancer, "PROXY TCP4 localhost 1.2.3.5 1 2\r\n", "must begin", "invalid PROXY protocol header", 0},
		{"no port", balancer, "PROXY TCP4 1.2.3.4 1.2.3.5 70000 2\r\n", "must begin", "invalid PROXY protocol header", 0},
		{"endless", balancer, "PROXY TCP4 " + strings.Repeat("1", 200), "must begin", "its line is too long", 0},
		{"not version 2", balancer, "\r\n\r\n\x00\r\nQUIX\n\x21\x11\x00\x00", "must begin", "no PROXY protocol header", 0},
		{"huge", balancer, proxyV2 + "\x21\x11\xff\xff", "must begin", "65535 bytes", 0},
		{"not TCP", balancer, v2(proxyproto.PROXY, &net.UDPAddr{IP: far4.IP, Port: 1}, &net.UDPAddr{IP: near4.IP, Port: 2}), "must begin", "does not describe a TCP connection", 0},
		{"unix", balancer, v2(proxyproto.PROXY, &net.UnixAddr{Net: "unix", Name: "/a"}, &net.UnixAddr{Net: "unix", Name: "/b"}), "must begin", "does not describe a TCP connection", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newProxiedGateway(t)
				began := time.Now()
				nc, served := gw.dialFrom(t.Context(), tt.from)
				io.WriteString(nc, tt.sent)
				told, _ := io.ReadAll(nc)
				<-served
				if !strings.Contains(string(told), tt.told) || !strings.Contains(gw.logged(), tt.logged) || len(gw.dials) > 0 {
					t.Errorf("the client read %q; the log:\n%s", told, gw.logged())
				}
				if took := time.Since(began); took != tt.after {
					t.Errorf("closed after %v, want %v", took, tt.after)
				}
			})
		})
	}
}

// TestHealthCheck: a health check of a load balancer is not logged.
func TestHealthCheck(t *testing.T) {
	for name, header := range map[string]string{
		"nothing": "", "version 1": "PROXY UNKNOWN\r\n", "version 2": v2(proxyproto.LOCAL, far4, near4), "version 2, bare": proxyV2 + "\x20\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				gw := newProxiedGateway(t)
				nc, served := gw.dialFrom(t.Context(), balancer)
				io.WriteString(nc, header)
				if header != "" { // it reads the identification
					greeting := make([]byte, 8)
					if _, err := io.ReadFull(nc, greeting); err != nil || string(greeting) != "SSH-2.0-" {
						t.Errorf("it read %q, %v", greeting, err)
					}
				}
				nc.Close()
				<-served
				if gw.logged() != "" {
					t.Errorf("logged:\n%s", gw.logged())
				}
			})
		})
	}
}

// TestProxyHeaderLimit: connections that wait for a header are limited, and do not prevent
// other logins.
func TestProxyHeaderLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newProxiedGateway(t)
		gw.srv.MaxStartups = Startups{3, 100, 3}
		for range 3 {
			nc, _ := gw.dialFrom(t.Context(), balancer)
			defer nc.Close()
		}
		synctest.Wait()
		nc, served := gw.dialFrom(t.Context(), balancer)
		defer nc.Close()
		<-served
		if !strings.Contains(gw.logged(), "waiting for PROXY protocol headers: 3 connections") {
			t.Errorf("the fourth connection is not rejected:\n%s", gw.logged())
		}
		direct, _ := gw.dialFrom(t.Context(), "192.0.2.1")
		c, err := loginOn(direct, "alice", gw.alice)
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		time.Sleep(proxyHeaderTimeout)
		synctest.Wait()
		nc, _ = gw.dialFrom(t.Context(), balancer)
		io.WriteString(nc, v2(proxyproto.PROXY, far4, near4))
		if c, err = loginOn(nc, "alice", gw.alice); err != nil {
			t.Fatal(err)
		}
		c.Close()
	})
}

// TestProxyHeaderAndDrain ends the gateway while a connection waits for a header.
func TestProxyHeaderAndDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newProxiedGateway(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		nc, served := gw.dialFrom(ctx, balancer)
		defer nc.Close()
		time.Sleep(time.Second)
		began := time.Now()
		cancel(errDraining)
		<-served
		if time.Since(began) > 0 || gw.logged() != "" {
			t.Errorf("after %v; the log:\n%s", time.Since(began), gw.logged())
		}
	})
}

// TestSourcesBehindBalancer: PerSourceMaxStartups counts by the client's address, not by the
// load balancer's.
func TestSourcesBehindBalancer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gw := newProxiedGateway(t)
		gw.srv.PerSourceMaxStartups = 1
		greeted := func(source string) bool {
			nc, _ := gw.dialFrom(t.Context(), balancer)
			t.Cleanup(func() { nc.Close() })
			fmt.Fprintf(nc, "PROXY TCP4 %s 198.51.100.1 5000 22\r\n", source)
			nc.SetReadDeadline(time.Now().Add(rejectTimeout))
			greeting, _ := io.ReadAll(nc)
			return strings.HasPrefix(string(greeting), "SSH-") && !strings.Contains(string(greeting), "Exceeded MaxStartups")
		}
		if !greeted("203.0.113.1") || greeted("203.0.113.1") || !greeted("203.0.113.2") {
			t.Error("another source is rejected")
		}
		gw.srv.startups.mu.Lock()
		defer gw.srv.startups.mu.Unlock()
		if n := gw.srv.startups.source[netip.MustParsePrefix(balancer+"/32")]; n != 0 {
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
		// No byte is lost, and no byte beyond the header is read.
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
		if !h.Command.IsLocal() && (!identity.AddrPort(h.SourceAddr).IsValid() || !identity.AddrPort(h.DestinationAddr).IsValid() || identity.AddrPort(h.SourceAddr).Addr().Is4In6()) {
			t.Fatalf("%q: from %v to %v", raw, h.SourceAddr, h.DestinationAddr)
		}
		// The library decides where a header ends.
		var again bytes.Buffer
		if _, err := h.WriteTo(&again); err != nil {
			t.Fatalf("%q cannot be written again: %v", raw, err)
		}
	})
}
