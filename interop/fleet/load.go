package main

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"time"
)

const (
	// maxInFlight limits the connections of the load. A paused gateway holds its
	// share of the logins of a minute.
	maxInFlight = 800
	// sshUsers log in by OpenSSH's client only, one after the other.
	sshUsers = 5
	// recentUsers log in while there are as many bastions as -tasks.
	recentUsers = 50
)

// A load is the users of a run.
type load struct {
	*fleet
	wg       sync.WaitGroup
	inFlight chan struct{}

	mu     sync.Mutex
	recent []int                // the last users, the newest last
	ssh    [sshUsers]sync.Mutex // held during a login
	// staying is the number of sessions that stay at each gateway.
	staying [gateways + 1]int
}

func newLoad(f *fleet) *load { return &load{fleet: f, inFlight: make(chan struct{}, maxInFlight)} }

// run keeps the long sessions open, and begins one login after the other, until ctx
// ends. It returns when all connections have ended. If the machine is slow, it makes
// fewer logins.
func (l *load) run(ctx context.Context) {
	for i := range l.sessions {
		l.wg.Go(func() { l.stay(ctx, i) })
	}
	for n := 0; sleep(ctx, l.time/time.Duration(l.logins)); n++ {
		select {
		case l.inFlight <- struct{}{}:
		case <-ctx.Done():
			continue
		}
		l.wg.Go(func() {
			defer func() { <-l.inFlight }()
			l.visit(context.WithoutCancel(ctx), n)
		})
	}
	l.wg.Wait()
}

// visit is the nth login: mostly a command or a short session, sometimes OpenSSH's
// client.
func (l *load) visit(ctx context.Context, n int) {
	l.results.add(l.results.Counts, "logins", 1)
	if n%100 == 50 {
		l.visitBySSH(ctx, n/100%sshUsers)
		return
	}
	s := l.login(ctx, l.nextUser())
	if s == nil {
		return
	}
	stay := time.Duration(0)
	if rand.IntN(10) < 4 {
		stay = 2*time.Second + rand.N(13*time.Second)
	}
	l.judge(s, s.hold(ctx, stay))
}

// stay keeps a session open until ctx ends. If it is lost, the user logs in again.
func (l *load) stay(ctx context.Context, user int) {
	for ctx.Err() == nil {
		l.results.add(l.results.Counts, "logins", 1)
		l.results.add(l.results.Counts, "logins of sessions that stay", 1)
		s := l.login(context.WithoutCancel(ctx), user)
		if s == nil {
			sleep(ctx, 2*time.Second)
			continue
		}
		l.stays(s.gateway, 1)
		err := s.hold(ctx, 24*time.Hour)
		l.stays(s.gateway, -1)
		l.judge(s, err)
	}
}

// stays changes the number of sessions that stay at a gateway.
func (l *load) stays(gateway, by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.staying[gateway] += by
}

// awaitStaying returns when a gateway has one of the sessions that stay.
func (l *load) awaitStaying(ctx context.Context, gateway int) error {
	for deadline := time.Now().Add(patience); sleep(ctx, 100*time.Millisecond); {
		l.mu.Lock()
		n := l.staying[gateway]
		l.mu.Unlock()
		if n > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s has no session that stays", namespaceOf(gateway))
		}
	}
	return context.Cause(ctx)
}

// nextUser chooses a user of x/crypto's client.
func (l *load) nextUser() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	user := rand.IntN(max(1, l.users-sshUsers))
	if int(l.live.Load()) >= l.maxTasks && len(l.recent) > 0 {
		return l.recent[rand.IntN(len(l.recent))]
	}
	l.recent = append(l.recent, user)
	l.recent = l.recent[max(0, len(l.recent)-recentUsers):]
	return user
}

// login logs in, and judges a refusal.
func (l *load) login(ctx context.Context, user int) *session {
	s, err := l.open(ctx, user, 0)
	if err == nil {
		return s
	}
	l.judgeRefusal(refusedLogins, user, err)
	return nil
}

// judgeRefusal counts a refused login, which breaks the promise unless a fault explains it.
func (f *fleet) judgeRefusal(promise string, user int, err error) {
	var r *refusal
	if !errors.As(err, &r) {
		r = &refusal{reason: err.Error()}
	}
	text := fmt.Sprintf("%s by %v; begun at %s\n%s", userName(user), r, r.began.UTC().Format(time.TimeOnly), f.describe(user))
	f.judgeLater(func() {
		if by := f.blame.login(r.gateway, r.began, r.ended); by != nil {
			f.results.add(f.results.Refused, r.reason, 1)
			return
		}
		f.results.violate(promise, "%s", text)
	})
}

// judgeLater has settle call a function: what explains a failure may be known only later.
func (f *fleet) judgeLater(judge func()) {
	f.judging.Lock()
	defer f.judging.Unlock()
	f.judgements = append(f.judgements, judge)
}

// settle judges the failures so far.
func (f *fleet) settle() {
	f.judging.Lock()
	defer f.judging.Unlock()
	for _, judge := range f.judgements {
		judge()
	}
	f.judgements = nil
}

// judge counts the end of a session; err says that it was lost.
func (l *load) judge(s *session, err error) {
	if wrong := s.wrong(); wrong != nil {
		l.results.violate(lostBytes, "%s by %s: %v\n%s", userName(s.user), routeName(s.gateway), wrong, l.describe(s.user))
	}
	s.mu.Lock()
	l.results.add(l.results.Counts, "bytes echoed", int(s.received))
	s.mu.Unlock()
	if err == nil {
		l.results.add(l.results.Counts, "sessions that ended well", 1)
		return
	}
	ended := time.Now()
	text := fmt.Sprintf("%s by %s at %s: %v\n%s", userName(s.user), routeName(s.gateway), ended.UTC().Format(time.TimeOnly), err, l.describe(s.user))
	l.judgeLater(func() {
		if by := l.blame.session(s.gateway, s.began, ended); by != nil {
			l.results.add(l.results.Lost, by.kind.name, 1)
			return
		}
		l.results.violate(lostSessions, "%s", text)
	})
}

// visitBySSH logs in by OpenSSH's client, and sends 100,000 bytes through cat.
func (l *load) visitBySSH(ctx context.Context, which int) {
	l.ssh[which].Lock()
	defer l.ssh[which].Unlock()
	l.results.add(l.results.Counts, "logins by OpenSSH", 1)
	user := max(0, l.users-sshUsers+which)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	input := make([]byte, 100_000)
	crand.Read(input)
	cmd := exec.CommandContext(ctx, "ssh", "-F", "/dev/null", "-b", clientAddr(user), "-i", l.path(userName(user)), "-p", fmt.Sprint(sshPort),
		"-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none", "-o", "BatchMode=yes", "-o", "UserKnownHostsFile="+l.path("known_hosts"),
		userName(user)+"@"+balancerAddr, "cat")
	cmd.Stdin = bytes.NewReader(input)
	var out, text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &text
	began := time.Now()
	err := cmd.Run()
	gateway := l.balancer.route(clientAddr(user))
	if err != nil {
		l.judgeRefusal(refusedLogins, user, &refusal{gateway, began, time.Now(), reason(err, text.String())})
		return
	}
	if !bytes.Equal(out.Bytes(), input) {
		l.results.violate(lostBytes, "%s by OpenSSH and %s: %d bytes of %d\n%s", userName(user), routeName(gateway), out.Len(), len(input), l.describe(user))
		return
	}
	l.results.add(l.results.Counts, "sessions that ended well", 1)
}

// describe returns the tasks of a user, for the description of a broken promise.
func (f *fleet) describe(user int) string {
	owner := userName(user) + "+default"
	var lines []string
	for _, t := range f.tasks() {
		if t.Owner == owner {
			lines = append(lines, fmt.Sprintf("\ttask %s, generation %s, created %s: %s, should be %s",
				t.ARN, t.Env["SALLYPORT_GENERATION"], t.Created.UTC().Format(time.TimeOnly), t.Last, t.Desired))
		}
	}
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

// watch begins watchTasks and watchLoad. Stop ends them and waits for their end.
func (f *fleet) watch(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { f.watchTasks(ctx) })
	watchers.Go(func() { f.watchLoad(ctx) })
	return func() { cancel(); watchers.Wait() }
}

// watchTasks looks for owners with two live tasks until ctx ends. The imitation of AWS
// also compares them at each launch.
func (f *fleet) watchTasks(ctx context.Context) {
	reported := map[string]bool{}
	report := func(text, owner string) {
		if !reported[text] {
			reported[text] = true
			var user int
			fmt.Sscanf(owner, "user%d+", &user)
			f.results.violate(twoTasks, "%s\n%s", text, f.describe(user))
		}
	}
	for looks, most := 1, 0; ; looks++ {
		if f.cloud != nil {
			for _, v := range f.cloud.Violations() {
				report(v, v)
			}
		}
		live, count := map[string]string{}, 0
		for _, t := range f.tasks() {
			if t.Desired != "RUNNING" {
				continue
			}
			count++
			if other := live[t.Owner]; other != "" {
				report(fmt.Sprintf("%s has the live tasks %s and %s", t.Owner, other, t.ARN), t.Owner)
			}
			live[t.Owner] = t.ARN
		}
		f.live.Store(int32(count))
		most = max(most, count)
		if !sleep(ctx, 250*time.Millisecond) {
			f.results.add(f.results.Counts, "looks at the list of tasks", looks)
			f.results.add(f.results.Counts, "most live tasks", most)
			return
		}
	}
}

// left describes the tasks that have not stopped.
func (f *fleet) left() []string {
	var left []string
	for _, t := range f.tasks() {
		if t.Last != "STOPPED" {
			left = append(left, fmt.Sprintf("task %s of %s, generation %s, is %s", t.ARN, t.Owner, t.Env["SALLYPORT_GENERATION"], t.Last))
		}
	}
	return left
}

// awaitEnds waits until all tasks have stopped, for at most the idle time, the age of
// orphans and the interval of sweeps, and counts those that have not.
func (f *fleet) awaitEnds(ctx context.Context) {
	began := time.Now()
	for len(f.left()) > 0 && time.Since(began) < f.idle+orphanAge+sweepInterval {
		if !sleep(ctx, 500*time.Millisecond) {
			return
		}
	}
	f.results.add(f.results.Counts, "seconds until the last task stopped", int(time.Since(began).Seconds()))
	for _, t := range f.left() {
		f.results.violate(leftTasks, "%s", t)
	}
}
