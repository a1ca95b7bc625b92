package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
)

const (
	// firstSweep is the time after which the first sweep of a new gateway, whose calls
	// are not those of logins, has ended.
	firstSweep = 20 * time.Second
)

// startStandIns is startFakes for the part crowd: a thousand agents would not fit on a
// small machine, so each task is an SSH server in this process, and ends at the end.
func startStandIns(ctx context.Context, f *fleet) (environ []string, err error) {
	f.users, f.idle = f.crowdUsers, time.Hour
	standIns, err := newStandIns()
	if err != nil {
		return nil, err
	}
	f.cloud = awsfake.New(standIns)
	state := awsfake.Fixed(100 * time.Millisecond)
	f.cloud.Times = awsfake.Times{Provisioning: state, Pending: state, Activating: state, Reporting: state}
	return f.serveFakes(ctx)
}

// crowd has -crowd users log in at once, each to a bastion that does not run, and
// compares the time with the throttling that AWS documents, and the number of calls
// with their goals.
func (f *fleet) crowd(ctx context.Context) error {
	defer f.watch(ctx)()
	if !sleep(ctx, firstSweep) {
		return nil
	}
	table, aws := f.tableCalls(), f.awsCalls()
	began := time.Now()
	users := float64(f.crowdUsers)
	gatewayOf := make([]int, f.crowdUsers)
	f.everyone(f.crowdUsers, func(user int) {
		s, err := f.open(ctx, user, 0)
		if err != nil {
			f.judgeRefusal(refusedLogins, user, err)
			return
		}
		gatewayOf[user] = s.gateway
		s.client.Close()
	})
	took := time.Since(began)
	if ctx.Err() != nil {
		return nil
	}
	launches := awsfake.Documented["launch"]
	allowed := (users - launches.Burst) / launches.Rate
	f.figure(fmt.Sprintf("time of %d simultaneous first logins, as a multiple of the time that AWS's throttling permits", f.crowdUsers), took.Seconds()/allowed, "<= 1.1")
	cold, coldAWS := f.tableCalls()-table, f.awsCalls()
	f.figure("calls of DynamoDB for each of these logins", float64(cold)/users, "<= 2")
	starting := 0
	for action, n := range coldAWS {
		if action != "ecs:DescribeTasks" {
			starting += n - aws[action]
		}
	}
	f.figure("calls of ECS for each of them, without the shared DescribeTasks", float64(starting)/users, "<= 2")
	f.figure("calls of DescribeTasks, of all gateways, a second", float64(coldAWS["ecs:DescribeTasks"]-aws["ecs:DescribeTasks"])/took.Seconds(), "")
	refused := 0
	for _, c := range f.cloud.Calls() {
		if c.Refused == awsfake.Throttled.Code {
			refused++
		}
	}
	f.figure("throttled calls of AWS, in all", float64(refused), "")

	warmLogins := min(200, f.crowdUsers)
	for _, warm := range []struct {
		name string
		goal string
		via  func(user int) int // gateway
	}{
		{"calls of DynamoDB and AWS for each login to a running bastion, by the same gateway", "0", func(user int) int { return gatewayOf[user] }},
		{"the same, by a gateway that has not entered the bastion before", "", func(user int) int { return gatewayOf[user]%gateways + 1 }},
	} {
		table, aws := f.tableCalls(), sum(f.awsCalls())
		f.everyone(warmLogins, func(user int) {
			s, err := f.open(ctx, user, warm.via(user))
			if err != nil {
				f.judgeRefusal(refusedLogins, user, err)
				return
			}
			s.client.Close()
		})
		f.figure(warm.name, float64(f.tableCalls()-table+sum(f.awsCalls())-aws)/float64(warmLogins), warm.goal)
	}
	f.results.add(f.results.Counts, "logins", f.crowdUsers+2*warmLogins)
	f.endGateways()
	f.settle()
	return f.readLogs()
}

// everyone calls login for the users with numbers from 0 to n-1 at once.
func (f *fleet) everyone(n int, login func(user int)) {
	var users sync.WaitGroup
	for user := range n {
		users.Go(func() { login(user) })
	}
	users.Wait()
}

func (f *fleet) figure(name string, value float64, goal string) {
	f.results.mu.Lock()
	defer f.results.mu.Unlock()
	f.results.Figures = append(f.results.Figures, figure{name, value, goal})
}

// tableCalls returns the number of calls of the table, without heartbeats.
func (f *fleet) tableCalls() int { return sum(f.table.calls()) }

// awsCalls returns the number of calls of each action of AWS.
func (f *fleet) awsCalls() map[string]int {
	counts := map[string]int{}
	for _, c := range f.cloud.Calls() {
		counts[c.Action]++
	}
	return counts
}

func sum(counts map[string]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// standIns is a backend of the imitation of AWS whose containers are SSH servers of
// this process. Like an agent, each accepts its owner's certificates only; a session is
// an echo, whatever its command is.
type standIns struct{ hostKey ssh.Signer }

func newStandIns() (*standIns, error) {
	private, err := newKey()
	if err != nil {
		return nil, err
	}
	key, err := ssh.NewSignerFromSigner(private)
	return &standIns{key}, err
}

// A standIn is a container.
type standIn struct {
	ln     net.Listener
	exited chan struct{}

	mu    sync.Mutex
	conns map[net.Conn]bool // nil: it has exited
}

// Start implements [awsfake.Backend].
func (s *standIns) Start(_, ip string, env map[string]string) (awsfake.Container, error) {
	fleet, err := sshca.ParseKeys(env["SALLYPORT_FLEET_KEY"])
	if err != nil {
		return nil, err
	}
	config := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		id, err := sshca.Verifier{Fleet: fleet, Principal: env["SALLYPORT_PRINCIPAL"]}.Verify(key)
		if err == nil && id.User != env["SALLYPORT_OWNER"] {
			err = errors.New("not the owner")
		}
		return &ssh.Permissions{}, err
	}}
	config.AddHostKey(s.hostKey)
	ln, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(agentPort)))
	if err != nil {
		return nil, err
	}
	c := &standIn{ln: ln, exited: make(chan struct{}), conns: map[net.Conn]bool{}}
	go func() { // ends with the listener
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go c.serve(nc, config) // ends with the connection
		}
	}()
	return c, nil
}

func (c *standIn) serve(nc net.Conn, config *ssh.ServerConfig) {
	defer nc.Close()
	c.mu.Lock()
	if c.conns == nil {
		c.mu.Unlock()
		return
	}
	c.conns[nc] = true
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.conns, nc)
	}()
	_, chans, reqs, err := ssh.NewServerConn(nc, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(reqs) // this and the next ones end with the connection
	for open := range chans {
		ch, reqs, err := open.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range reqs {
				r.Reply(r.Type == "exec", nil)
			}
		}()
		go func() {
			io.Copy(ch, ch)
			ch.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{0}))
			ch.Close()
		}()
	}
}

// Stop implements [awsfake.Container].
func (c *standIn) Stop(bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conns == nil {
		return
	}
	c.ln.Close()
	for nc := range c.conns {
		nc.Close()
	}
	c.conns = nil
	close(c.exited)
}

// Exited implements [awsfake.Container].
func (c *standIn) Exited() <-chan struct{} { return c.exited }

// ExitCode implements [awsfake.Container].
func (c *standIn) ExitCode() int { return 0 }
