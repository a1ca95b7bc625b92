package gateway

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// TestStartupsOfOneSource: one source that takes all slots it can get does not prevent
// logins of others.
func TestStartupsOfOneSource(t *testing.T) {
	var s startups
	at := func(i byte) netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), 32) }
	held := 0
	for range 150 {
		if _, err := s.take(at(1), Startups{}, 10); err == nil {
			held++
		}
	}
	if held == 0 || held > 10 {
		t.Errorf("one source has %d slots, want 1 to 10", held)
	}
	for range 1000 {
		a, err := s.take(at(2), Startups{}, 10)
		if err != nil {
			t.Fatalf("the first connection of another source: %v", err)
		}
		a.release()
	}
	// With many sources, the probability is that of sshd.
	for i := range byte(9) {
		s.take(at(10+i), Startups{}, 10)
	}
	refused := 0
	for range 1000 {
		a, err := s.take(at(100), Startups{}, 10)
		if err != nil {
			refused++
			continue
		}
		a.release()
	}
	if refused < 200 || refused > 400 { // 300, with a standard deviation of 15
		t.Errorf("with ten sources %d of 1000 connections of an eleventh are refused, want 300", refused)
	}
}

// TestRejected: real clients show why they are rejected.
func TestRejected(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		make       func(gw *testGateway)
	}{
		{"penalty", "Not allowed at this time: too many logins from your address have failed. Try again in ", func(gw *testGateway) {
			gw.srv.PerSourcePenalties = sshdPenalties
			gw.srv.penalties.add(NetBlockSize{}.source(netip.MustParseAddr("127.0.0.1")), sshdPenalties, 10*time.Minute, "x")
		}},
		{"startups", "Exceeded MaxStartups: too many connections have not logged in yet", func(gw *testGateway) {
			gw.srv.MaxStartups = Startups{1, 100, 1}
			gw.srv.startups.take(netip.Prefix{}, gw.srv.MaxStartups, 0)
		}},
		{"startups of one source", "Exceeded MaxStartups: too many connections from your address", func(gw *testGateway) {
			gw.srv.PerSourceMaxStartups = 1
			gw.srv.startups.take(NetBlockSize{}.source(netip.MustParseAddr("127.0.0.1")), Startups{}, 0)
		}},
	} {
		for _, client := range []string{
			"ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -p PORT alice@127.0.0.1 true",
			"plink -batch -P PORT alice@127.0.0.1 true",
		} {
			args := strings.Fields(client)
			t.Run(tt.name+"/"+args[0], func(t *testing.T) {
				if _, err := exec.LookPath(args[0]); err != nil {
					t.Skip(err)
				}
				gw := newTestGateway(t)
				tt.make(gw)
				ln, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				go func() {
					if nc, err := ln.Accept(); err == nil {
						gw.srv.ServeConn(t.Context(), nc)
					}
				}()
				_, port, _ := net.SplitHostPort(ln.Addr().String())
				cmd := exec.Command(args[0], strings.Fields(strings.ReplaceAll(client, "PORT", port))[1:]...)
				cmd.Env = []string{"HOME=" + t.TempDir()}
				out, err := cmd.CombinedOutput()
				if err == nil || !strings.Contains(strings.ReplaceAll(string(out), "\r\n", ""), tt.want) {
					t.Errorf("the client shows, %v:\n%s\nwant %q", err, out, tt.want)
				}
			})
		}
	}
}
