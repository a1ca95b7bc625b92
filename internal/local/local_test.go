package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/bastion"
	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/sshca"
	"github.com/sallyport-ssh/sallyport/internal/sshtest"
)

// newLauncher returns a launcher of the test binary's own agents in a fresh
// folder. All agents in it are killed when the test ends.
func newLauncher(t *testing.T) *Launcher {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := &Launcher{
		Dir:       filepath.Join(t.TempDir(), "bastions"),
		FleetKeys: []ssh.PublicKey{sshtest.NewKey(t).PublicKey()},
		Options:   Options{Agent: self, Account: "nobody"},
		Log:       slog.New(slog.DiscardHandler),
	}
	t.Cleanup(func() {
		for _, pid := range agents(l) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return l
}

// agents returns the processes that hold a lock in l's folders.
func agents(l *Launcher) (pids []int) {
	locks, _ := filepath.Glob(filepath.Join(l.Dir, "*", "agent.lock"))
	procs, _ := os.ReadDir("/proc")
	for _, lock := range locks {
		file, err := os.Stat(lock)
		if err != nil {
			continue
		}
		for _, proc := range procs {
			if pid, err := strconv.Atoi(proc.Name()); err == nil && principal(pid) != "" && hasOpen(pid, file) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func mustLaunch(t *testing.T, l *Launcher) bastion.Task {
	t.Helper()
	task, err := l.Launch(t.Context(), launchAlice)
	if err != nil {
		t.Fatal(err)
	}
	return task
}

func gone(l *Launcher, task bastion.Task) bool {
	return errors.Is(l.Alive(context.Background(), alice, task.ID), bastion.ErrGone)
}

func TestLife(t *testing.T) {
	t.Setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
	t.Setenv("LANG", "C.UTF-8")
	l := newLauncher(t)
	first := mustLaunch(t, l)
	if !regexp.MustCompile(`^local-alice\+default-1-[0-9a-f]{8}$`).MatchString(first.ID) || first.HostKey == nil || first.Generation != 1 {
		t.Errorf("task %+v", first)
	}
	if err := l.Alive(t.Context(), alice, first.ID); err != nil {
		t.Errorf("after Launch: %v", err)
	}
	if err := l.Alive(t.Context(), alice, "local-alice+default-1-00000000"); !errors.Is(err, bastion.ErrGone) {
		t.Errorf("of another task: %v", err)
	}
	log, err := os.ReadFile(filepath.Join(l.Dir, "alice+default", "agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	if s := string(log); strings.Contains(s, "hunter2") || !strings.Contains(s, "LANG=C.UTF-8") || !strings.Contains(s, "dir=/ ") || !strings.Contains(s, "leader=true") {
		t.Errorf("the agent runs with %s", s)
	}
	if info, err := os.Stat(filepath.Join(l.Dir, "alice+default")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("folder: %v %v", info, err)
	}

	// If the owner has a live task, Launch returns it, for any generation.
	again, err := l.Launch(t.Context(), bastion.Launch{Owner: alice, Generation: 7})
	if err != nil || again.ID != first.ID || !bytes.Equal(again.HostKey.Marshal(), first.HostKey.Marshal()) {
		t.Errorf("launched again: %+v, %v", again, err)
	}

	if err := l.Stop(t.Context(), alice, "local-alice+default-1-00000000"); err != nil || gone(l, first) {
		t.Errorf("stopping another task: %v", err)
	}
	pids := agents(l)
	if err := l.Stop(t.Context(), alice, first.ID); err != nil {
		t.Fatal(err)
	}
	if !gone(l, first) {
		t.Error("alive after Stop")
	}
	sshtest.Eventually(t, "the agent is reaped", func() bool { return len(pids) == 1 && syscall.Kill(pids[0], 0) == syscall.ESRCH })
	if err := l.Stop(t.Context(), alice, first.ID); err != nil {
		t.Errorf("stopped again: %v", err)
	}

	// The folder holds the last generation, so a restarted launcher continues
	// with the next.
	restarted := *l
	if second := mustLaunch(t, &restarted); second.Generation != 2 || second.ID == first.ID {
		t.Errorf("second task %+v", second)
	}
}

func TestManyLaunchOne(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	var mu sync.Mutex
	ids := map[string]int{}
	add := func(id string, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			t.Error(err)
		}
		ids[id]++
	}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			task, err := l.Launch(t.Context(), launchAlice)
			add(task.ID, err)
		})
	}
	for range 4 {
		wg.Go(func() {
			out, err := launcherProcess(l, "").Output()
			add(strings.TrimSpace(string(out)), err)
		})
	}
	wg.Wait()
	if len(ids) != 1 || len(agents(l)) != 1 {
		t.Errorf("tasks %v, agents %v", ids, agents(l))
	}
}

// launcherProcess is a gateway process that launches alice's bastion.
func launcherProcess(l *Launcher, mode string) *exec.Cmd {
	return exec.Command(l.Agent, "launch", l.Dir, sshca.FormatKeys(l.FleetKeys), mode)
}

func TestKilledAgentIsGone(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	first := mustLaunch(t, l)
	for _, pid := range agents(l) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	sshtest.Eventually(t, "a killed agent is gone", func() bool { return gone(l, first) })
	if tasks, err := l.List(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("listed %v, %v", tasks, err)
	}
	if second := mustLaunch(t, l); second.ID == first.ID || len(agents(l)) != 1 {
		t.Errorf("then %+v, agents %v", second, agents(l))
	}
}

// TestAgentOutlivesGateway: if a gateway has exited, the next one lists and returns
// its agent.
func TestAgentOutlivesGateway(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	out, err := launcherProcess(l, "").Output()
	if err != nil {
		t.Fatal(err)
	}
	id := strings.TrimSpace(string(out))
	if err := os.MkdirAll(filepath.Join(l.Dir, "not an owner"), 0o700); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(l.Dir, "bob+default"), 0o700) // an owner without a task
	tasks, err := l.List(t.Context())
	if err != nil || len(tasks) != 1 || tasks[0].Owner != alice || tasks[0].Task.ID != id || tasks[0].Task.HostKey == nil {
		t.Fatalf("listed %v, %v; want %s", tasks, err, id)
	}
	if task := mustLaunch(t, l); task.ID != id {
		t.Errorf("launched %s, want the running %s", task.ID, id)
	}
	if err := l.Stop(t.Context(), alice, id); err != nil || !gone(l, tasks[0].Task) {
		t.Errorf("stopping it: %v", err)
	}
}

// TestGatewayKilledMidLaunch: if a gateway is killed before its agent has reported its
// address, the next Launch kills that agent and starts another.
func TestGatewayKilledMidLaunch(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	gateway := launcherProcess(l, "mode=mute")
	if err := gateway.Start(); err != nil {
		t.Fatal(err)
	}
	sshtest.Eventually(t, "the agent is started", func() bool { return len(agents(l)) == 1 })
	orphan := agents(l)[0]
	gateway.Process.Kill()
	gateway.Wait()

	if tasks, err := l.List(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("listed a task that is not ready: %v, %v", tasks, err)
	}
	task := mustLaunch(t, l)
	if pids := agents(l); len(pids) != 1 || pids[0] == orphan || task.Generation != 2 {
		t.Errorf("agents %v after orphan %d, task %+v", pids, orphan, task)
	}
}

// TestGatewayKilledAnywhere kills gateways at random times during a launch. The next
// launch must succeed, with one agent running.
func TestGatewayKilledAnywhere(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	for range 12 {
		gateway := launcherProcess(l, "")
		if err := gateway.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(mathrand.N(150 * time.Millisecond))
		gateway.Process.Kill()
		gateway.Wait()
		task := mustLaunch(t, l)
		if err := l.Alive(t.Context(), alice, task.ID); err != nil {
			t.Error(err)
		}
		if pids := agents(l); len(pids) != 1 {
			t.Errorf("agents %v", pids)
		}
		if err := l.Stop(t.Context(), alice, task.ID); err != nil {
			t.Error(err)
		}
	}
}

// TestSocket: an agent listens only on a Unix socket in its owner's folder, also if
// the path is longer than a socket address permits. The socket of a killed agent is
// removed by the next launch.
func TestSocket(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	l.Dir = filepath.Join(t.TempDir(), strings.Repeat("long", 50), "bastions")
	owner := bastion.Owner{User: strings.Repeat("u", 64), Profile: strings.Repeat("p", 64)}
	fleet := sshtest.NewKey(t)
	l.FleetKeys = []ssh.PublicKey{fleet.PublicKey()}
	dialer := &bastion.Dialer{
		Settings: bastion.Settings{
			Profiles:  map[string]bastion.Profile{owner.Profile: {Launcher: l, ProfileOptions: bastion.ProfileOptions{Idle: time.Minute, MaxLife: time.Hour}}},
			FleetKeys: []ssh.Signer{fleet},
		},
		Ledger: &bastion.Memory{},
		Log:    slog.New(slog.DiscardHandler),
	}
	sockets := func() []string {
		paths, err := filepath.Glob(filepath.Join(l.Dir, "*", "*.sock"))
		if err != nil {
			t.Fatal(err)
		}
		return paths
	}
	before := ""
	for range 2 {
		conn, err := dialer.Dial(t.Context(), identity.Identity{User: owner.User, Profile: owner.Profile, ConnID: "c"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		paths := sockets()
		if len(paths) != 1 || conn.Task.Addr != "unix:"+paths[0] || paths[0] == before {
			t.Errorf("sockets %q, address %s", paths, conn.Task.Addr)
		}
		before = paths[0]
		for _, pid := range agents(l) {
			if ports := listeningPorts(t, pid); len(ports) > 0 {
				t.Errorf("the agent listens on %q", ports)
			}
			syscall.Kill(pid, syscall.SIGKILL) // leaves its socket behind
		}
		sshtest.Eventually(t, "the killed agent is gone", func() bool {
			return errors.Is(l.Alive(t.Context(), owner, conn.Task.ID), bastion.ErrGone)
		})
	}
}

// listeningPorts returns the local addresses of the TCP sockets that a process
// listens on, as in /proc/net/tcp.
func listeningPorts(t *testing.T, pid int) (addrs []string) {
	t.Helper()
	inodes := map[string]bool{}
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	for _, fd := range fds {
		link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if inode, ok := strings.CutPrefix(link, "socket:["); ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	if len(inodes) == 0 {
		t.Errorf("process %d has no sockets", pid)
	}
	for _, table := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/net/" + table)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) > 9 && f[3] == "0A" && inodes[f[9]] {
				addrs = append(addrs, f[1])
			}
		}
	}
	return addrs
}

// TestOlderVersion: Launch replaces an agent that an older version started on a TCP
// port.
func TestOlderVersion(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	first := mustLaunch(t, l)
	home, _ := l.folder(alice)
	text := fmt.Sprintf(`{"id":%q,"generation":1,"addr":"127.0.0.1:40123","host_key":%q}`, first.ID, goodKey)
	if err := os.WriteFile(home.file("task.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if tasks, err := l.List(t.Context()); err != nil || len(tasks) != 0 {
		t.Errorf("listed %v, %v", tasks, err)
	}
	if err := l.Alive(t.Context(), alice, first.ID); err != nil {
		t.Errorf("alive: %v", err)
	}
	second := mustLaunch(t, l)
	if len(agents(l)) != 1 || second.ID == first.ID || second.Generation != 2 {
		t.Errorf("then %+v, agents %v", second, agents(l))
	}
}

func TestUnreadyAgents(t *testing.T) {
	t.Parallel()
	tests := []struct {
		mode string
		want string // in the error
	}{
		{"mode=crash", "cannot read the host key"},
		{"mode=garbage", "is not that of a Unix socket"},
		{"mode=flood", "EOF"},
		{"mode=mute", context.DeadlineExceeded.Error()},
	}
	for _, tt := range tests {
		t.Run(tt.mode, func(t *testing.T) {
			l := newLauncher(t)
			l.AcceptEnv = []string{tt.mode}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tt.mode == "mode=mute" {
				var stop context.CancelFunc
				ctx, stop = context.WithTimeout(ctx, time.Second)
				defer stop()
			}
			if _, err := l.Launch(ctx, launchAlice); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if pids := agents(l); len(pids) != 0 {
				t.Errorf("left agents %v", pids)
			}
			l.AcceptEnv = nil
			mustLaunch(t, l)
		})
	}
	t.Run("no such program", func(t *testing.T) {
		l := newLauncher(t)
		l.Agent = filepath.Join(t.TempDir(), "nothing")
		if _, err := l.Launch(t.Context(), launchAlice); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	})
}

func TestLaunchWaitsNoLongerThanCtx(t *testing.T) {
	l := newLauncher(t)
	home, _ := l.folder(alice)
	os.MkdirAll(home.path, 0o700)
	unlock, err := home.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithCancelCause(t.Context())
	enough := errors.New("enough")
	cancel(enough)
	if _, err := l.Launch(ctx, launchAlice); !errors.Is(err, enough) {
		t.Errorf("got %v", err)
	}
}

func TestStubbornAgentIsKilled(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	l.AcceptEnv = []string{"mode=stubborn"}
	l.grace = 500 * time.Millisecond
	task := mustLaunch(t, l)
	if err := l.Stop(t.Context(), alice, task.ID); err != nil || !gone(l, task) {
		t.Errorf("stop: %v", err)
	}
}

func TestGarbageTaskFile(t *testing.T) {
	t.Parallel()
	for _, garbage := range []string{"", "{", "null", `{"id":"x"}`, strings.Repeat("x", 2*maxFile)} {
		l := newLauncher(t)
		first := mustLaunch(t, l)
		home, _ := l.folder(alice)
		if err := os.WriteFile(home.file("task.json"), []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := l.Alive(t.Context(), alice, first.ID); err == nil || errors.Is(err, bastion.ErrGone) {
			t.Errorf("%q: Alive says %v, and cannot know", garbage, err)
		}
		if tasks, err := l.List(t.Context()); err != nil || len(tasks) != 0 {
			t.Errorf("%q: listed %v, %v", garbage, tasks, err)
		}
		second := mustLaunch(t, l)
		if pids := agents(l); len(pids) != 1 || second.ID == first.ID {
			t.Errorf("%q: agents %v, task %+v", garbage, pids, second)
		}
	}
}

func TestAccount(t *testing.T) {
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		user, configured string
		asRoot, asOther  string // "" for ErrNoAccount
	}{
		{"alice", "nobody", "nobody", ""},
		{"alice", me.Username, me.Username, me.Username},
		{"alice", "no-such-account", "", ""},
		{"nobody", "", "nobody", me.Username},
		{"no-such-user-here", "", "", me.Username},
		{"root", "", "", me.Username},
	}
	for _, tt := range tests {
		want := tt.asOther
		if os.Geteuid() == 0 {
			want = tt.asRoot
		}
		got, err := Options{Account: tt.configured}.AccountOf(tt.user)
		if got != want || errors.Is(err, bastion.ErrNoAccount) != (want == "") {
			t.Errorf("account of %s with %q configured: %q, %v; want %q", tt.user, tt.configured, got, err, want)
		}
	}
}

func TestNamesThatAreNoNames(t *testing.T) {
	l := newLauncher(t)
	for _, owner := range []bastion.Owner{
		{}, {User: "alice"}, {User: "..", Profile: "default"}, {User: "a/b", Profile: "default"},
		{User: "a+b", Profile: "default"}, {User: "a", Profile: "../x"}, {User: "-a", Profile: "x"},
		{User: "a\x00", Profile: "x"}, {User: "a\n", Profile: "x"}, {User: strings.Repeat("a", 65), Profile: "x"},
	} {
		if _, err := l.Launch(t.Context(), bastion.Launch{Owner: owner}); !errors.Is(err, bastion.ErrNoAccount) {
			t.Errorf("%q: %v", owner, err)
		}
	}
	if _, err := os.Stat(l.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}

func TestNoDescriptorLeaks(t *testing.T) {
	l := newLauncher(t)
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	cycle := func() {
		task := mustLaunch(t, l)
		l.Alive(t.Context(), alice, task.ID)
		l.List(t.Context())
		if err := l.Stop(t.Context(), alice, task.ID); err != nil {
			t.Fatal(err)
		}
		l.AcceptEnv = []string{"mode=crash"}
		l.Launch(t.Context(), launchAlice)
		l.AcceptEnv = nil
	}
	cycle() // so that descriptors opened once by the runtime are not counted
	before := count()
	for range 5 {
		cycle()
	}
	// The pidfd of a process is closed after the process is reaped.
	sshtest.Eventually(t, fmt.Sprintf("back to %d descriptors", before), func() bool { return count() <= before })
}

// TestDialer uses the launcher in three Dialers, each with a ledger of its own.
func TestDialer(t *testing.T) {
	t.Parallel()
	l := newLauncher(t)
	fleet := sshtest.NewKey(t)
	l.FleetKeys = []ssh.PublicKey{fleet.PublicKey()}
	newDialer := func() *bastion.Dialer {
		return &bastion.Dialer{
			Ledger: &bastion.Memory{},
			Settings: bastion.Settings{
				Profiles:  map[string]bastion.Profile{"default": {Launcher: l, ProfileOptions: bastion.ProfileOptions{Idle: time.Minute, MaxLife: time.Hour}}},
				FleetKeys: []ssh.Signer{fleet},
			},
			Log: slog.New(slog.DiscardHandler),
		}
	}
	dial := func(d *bastion.Dialer) bastion.Task {
		t.Helper()
		conn, err := d.Dial(t.Context(), identity.Identity{User: "alice", Profile: "default", ConnID: "c"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		return conn.Task
	}
	first := newDialer()
	one := dial(first)
	if again := dial(first); again.ID != one.ID {
		t.Errorf("%s, then %s", one.ID, again.ID)
	}
	second := newDialer()
	if err := second.Adopt(t.Context()); err != nil {
		t.Fatal(err)
	}
	if adopted := dial(second); adopted.ID != one.ID {
		t.Errorf("%s, after a restart %s", one.ID, adopted.ID)
	}
	third := newDialer() // without Adopt
	if found := dial(third); found.ID != one.ID {
		t.Errorf("%s, without adoption %s", one.ID, found.ID)
	}
	if err := l.Stop(t.Context(), alice, one.ID); err != nil {
		t.Fatal(err)
	}
	two := dial(second)
	if two.ID == one.ID || two.Generation != 2 {
		t.Errorf("after its end: %+v", two)
	}
	// The other Dialers still have the stopped task in their ledgers, and find
	// the new one.
	for _, d := range []*bastion.Dialer{first, third} {
		if task := dial(d); task.ID != two.ID {
			t.Errorf("another gateway got %s, not %s", task.ID, two.ID)
		}
	}
}
