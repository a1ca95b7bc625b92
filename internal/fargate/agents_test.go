package fargate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// agents is a network in memory with the SSH servers of all tasks in it. They accept
// the same certificates as a bastion-agent with the same environment, and serve no
// channels.
type agents struct {
	key ssh.Signer // of all, to save time

	// boot is how long a container takes until its agent listens.
	boot func() time.Duration
	// skew is how far their clocks are ahead.
	skew time.Duration
	// shows, if not nil, gives agents other host keys.
	shows func(ip string) ssh.Signer

	mu         sync.Mutex
	byIP       map[string]*memAgent
	containers []*memContainer
	over       bool // see idle
	serving    sync.WaitGroup
}

type memAgent struct {
	env     map[string]string
	listens time.Time
	logins  []time.Time // of users, without those by which a gateway checks a bastion
	conns   []net.Conn
	open    int // connections that are logged in
	dead    bool
}

func newAgents(t testing.TB) *agents {
	return &agents{key: sshtest.NewKey(t), byIP: map[string]*memAgent{}, boot: func() time.Duration { return 5 * time.Second }}
}

// set calls f, which may change how agents behave.
func (a *agents) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// start runs an agent at ip, until stop is called.
func (a *agents) start(ip string, env map[string]string) (stop func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	agent := &memAgent{env: env, listens: time.Now().Add(a.boot())}
	a.byIP[ip] = agent
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		agent.dead = true
		for _, c := range agent.conns {
			c.Close()
		}
	}
}

var errRefused = errors.New("connection refused")

// dial is the network of the gateways.
func (a *agents) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	agent := a.byIP[host]
	if agent == nil || agent.dead || time.Now().Before(agent.listens) {
		return nil, errRefused
	}
	near, far := sshtest.Pipe()
	agent.conns = append(agent.conns, far)
	a.serving.Go(func() { a.serve(host, agent, far) })
	return near, nil
}

// dialPublic is the network outside of the VPC: it reaches public addresses only.
func (a *agents) dialPublic(ctx context.Context, network, addr string) (net.Conn, error) {
	rest, ok := strings.CutPrefix(addr, "203.0.")
	if !ok {
		return nil, errRefused
	}
	return a.dial(ctx, network, "10.0."+rest)
}

func (a *agents) serve(ip string, agent *memAgent, c net.Conn) {
	defer c.Close()
	fleet, err := sshca.ParseKeys(agent.env["SALLYPORT_FLEET_KEY"])
	if err != nil {
		panic(fmt.Sprintf("SALLYPORT_FLEET_KEY %q: %v", agent.env["SALLYPORT_FLEET_KEY"], err))
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			id, err := sshca.Verifier{Fleet: fleet, Principal: agent.env["SALLYPORT_PRINCIPAL"], Now: func() time.Time { return time.Now().Add(a.skew) }}.Verify(key)
			if err != nil {
				return nil, err
			}
			if id.User != agent.env["SALLYPORT_OWNER"] {
				return nil, errors.New("not the owner")
			}
			if id.ConnID != "start" && id.ConnID != "sweep" {
				a.mu.Lock()
				agent.logins = append(agent.logins, time.Now())
				a.mu.Unlock()
			}
			return &ssh.Permissions{}, nil
		},
	}
	config.AddHostKey(a.key)
	a.mu.Lock()
	if a.shows != nil {
		config.AddHostKey(a.shows(ip)) // replaces the other
	}
	a.mu.Unlock()
	conn, chans, reqs, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	a.set(func() { agent.open++ })
	defer a.set(func() { agent.open-- })
	var wg sync.WaitGroup
	wg.Go(func() {
		for req := range reqs {
			agrees := false
			a.set(func() {
				agrees = req.Type == "stop-if-unused@sallyport" && agent.open == 1
				agent.dead = agent.dead || agrees
			})
			req.Reply(agrees, nil)
		}
	})
	for ch := range chans {
		ch.Reject(ssh.Prohibited, "")
	}
	wg.Wait()
	conn.Close()
}
