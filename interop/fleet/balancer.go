package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const sshPort, monitoringPort = 2222, 9222

// A balancer is a haproxy in front of the gateways, and the record of the gateway to
// which it has passed each connection.
type balancer struct {
	addr    string
	process *process
	log     *net.UDPConn

	mu     sync.Mutex
	routes map[string]string // gateway, by the client's address and port
}

func startBalancer(s *spawner, dir string) (*balancer, error) {
	b := &balancer{addr: fmt.Sprintf("%s:%d", balancerAddr, sshPort), routes: map[string]string{}}
	var err error
	// A Unix socket would hold ten records (net.unix.max_dgram_qlen), and haproxy drops
	// those beyond.
	if b.log, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.ParseIP(balancerAddr)}); err != nil {
		return nil, err
	}
	b.log.SetReadBuffer(4 << 20)
	go b.read() // ends with the socket

	var config strings.Builder
	fmt.Fprintf(&config, `global
	maxconn 8000
	log %s format raw local0 info

defaults
	mode tcp
	log global
	# A record when the gateway has accepted the connection.
	option logasap
	log-format "%%ci:%%cp %%s"
	option redispatch 1
	retries 3
	timeout connect 10s
	timeout client 24h
	timeout server 24h
	timeout check 10s

listen ssh
	bind %s
	source %s
	balance roundrobin
	option httpchk GET /readyz
`, b.log.LocalAddr(), b.addr, balancerAddr)
	for i := 1; i <= gateways; i++ {
		fmt.Fprintf(&config, "\tserver %s %s:%d send-proxy-v2 check port %d inter 500ms fall 2 rise 2\n", namespaceOf(i), gatewayAddr(i), sshPort, monitoringPort)
	}
	file := filepath.Join(dir, "haproxy.cfg")
	if err := os.WriteFile(file, []byte(config.String()), 0o644); err != nil {
		return nil, err
	}
	b.process, err = s.start(dir, "haproxy", exec.Command("haproxy", "-db", "-f", file))
	return b, err
}

// read reads haproxy's log. Other records than those of connections have no port.
func (b *balancer) read() {
	buf := make([]byte, 4096)
	for {
		n, err := b.log.Read(buf)
		if err != nil {
			return
		}
		client, server, _ := strings.Cut(strings.TrimSpace(string(buf[:n])), " ")
		if _, _, err := net.SplitHostPort(client); err != nil || !strings.HasPrefix(server, "gateway") {
			continue
		}
		host, _, _ := net.SplitHostPort(client)
		b.mu.Lock()
		b.routes[client] = server
		b.routes[host] = server // the last connection of a client whose port is not known
		b.mu.Unlock()
	}
}

// route returns the number of the gateway that has a client's connection; zero if there
// is none. The record may be some time behind the connection.
func (b *balancer) route(client string) int {
	for wait := time.Millisecond; ; wait *= 2 {
		b.mu.Lock()
		server := b.routes[client]
		b.mu.Unlock()
		for i := 1; i <= gateways; i++ {
			if server == namespaceOf(i) {
				return i
			}
		}
		if wait > 4*time.Second {
			return 0
		}
		time.Sleep(wait)
	}
}

func (b *balancer) close() { b.log.Close() }
