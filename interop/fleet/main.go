// Command fleet proves that several gateways act as one. It starts three gateways, each
// in a network namespace of its own, behind a haproxy that sends PROXY headers, with a
// dynalite as their table and the imitation of AWS as their launcher, each of whose
// tasks is a bastion-agent. Then it logs in, again and again, while it kills, pauses,
// drains and cuts off gateways, and counts the promises that were broken:
//
//	fleet                      all parts; the faults take ten minutes
//	fleet -time 60s            the same, shorter
//	fleet -run upgrade         one part: faults, upgrade, moto or crowd
//	fleet -dir DIR             keep configuration and logs in DIR
//
// The exit status is 1 if a promise was broken. Load of the machine makes the run
// smaller, but does not fail it.
//
// Everything runs in a namespace of processes and networks, and ends with it. That needs
// root; where namespaces are not permitted, nothing runs, the program says so, and the exit
// status is 0.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/awsfake"
)

// stageVar has the stage of a process that this program starts. It is empty in the
// process that people start.
const (
	stageVar      = "FLEET_STAGE"
	stageInit     = "init"     // the first process of the namespaces
	stageIsolated = "isolated" // the run, in the namespaces
)

// notPermitted is the exit status of the first process of the namespaces if they
// cannot be set up.
const notPermitted = 77

// options are the flags.
type options struct {
	time  time.Duration
	users int
	// crowdUsers is the number of users of the part crowd.
	crowdUsers int
	logins     int
	sessions   int
	maxTasks   int
	seed       uint64
	bin        string
	dir        string
	json       string
	run        *regexp.Regexp
}

func parseFlags(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.DurationVar(&o.time, "time", 10*time.Minute, "duration of the load")
	flags.IntVar(&o.users, "users", 500, "number of users")
	flags.IntVar(&o.logins, "logins", 0, "number of logins; 0 means 1,000 a minute")
	flags.IntVar(&o.sessions, "sessions", 30, "sessions that stay open and check an echo each second")
	flags.IntVar(&o.maxTasks, "tasks", 250, "running bastions from which on only their users log in")
	flags.IntVar(&o.crowdUsers, "crowd", 1000, "number of users that log in at once in the part crowd, more than 100")
	flags.Uint64Var(&o.seed, "seed", 0, "seed of the choice of faults; 0 means a new one")
	flags.StringVar(&o.bin, "bin", "bin", "`folder` with gateway and bastion-agent")
	flags.StringVar(&o.dir, "dir", "", "keep configuration and logs in this `folder` (default: a temporary one, kept if a promise is broken)")
	flags.StringVar(&o.json, "json", "", "also write the results to this `file`")
	run := flags.String("run", "", "run only the parts whose name matches this `regexp`: faults, upgrade, moto, crowd")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	var err error
	if o.run, err = regexp.Compile(*run); err != nil {
		return o, fmt.Errorf("-run: %w", err)
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.time < 20*time.Second:
		return o, errors.New("-time is less than 20s")
	case o.users < 1 || o.users > maxUsers:
		return o, fmt.Errorf("-users is not between 1 and %d", maxUsers)
	case o.crowdUsers <= 100 || o.crowdUsers > maxUsers:
		return o, fmt.Errorf("-crowd is not between 101, one more than AWS starts at once, and %d", maxUsers)
	case o.sessions > o.users:
		return o, errors.New("-sessions exceeds -users")
	}
	if o.logins == 0 {
		o.logins = int(1000 * o.time.Minutes())
	}
	return o, nil
}

func main() {
	// A child that is to end with this process ends when the thread that started
	// it does (PR_SET_PDEATHSIG in prctl(2)).
	runtime.LockOSThread()
	var status int
	var err error
	switch stage := os.Getenv(stageVar); stage {
	case stageInit:
		status, err = initProcess()
	case stageIsolated:
		status, err = inside()
	default:
		status, err = outside()
	}
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		status = max(status, 1)
	}
	os.Exit(status)
}

// outside installs the programs that come from the network, which the namespaces do
// not reach, and runs the other stages.
func outside() (status int, err error) {
	o, err := parseFlags(os.Args[1:], os.Stderr)
	if err != nil {
		return 2, err
	}
	for _, program := range []string{"haproxy", "ssh", "node"} {
		if _, err := exec.LookPath(program); err != nil {
			return 1, fmt.Errorf("%w; install the Debian package", err)
		}
	}
	for _, name := range []string{"gateway", "bastion-agent"} {
		if _, err := os.Stat(filepath.Join(o.bin, name)); err != nil {
			return 1, fmt.Errorf("%w; run make build", err)
		}
	}
	if _, err := awsfake.InstallDynalite(); err != nil {
		return 1, err
	}
	if o.run.MatchString("moto") {
		if err := installMoto(); err != nil {
			return 1, err
		}
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	status, err = runStage(syscall.CLONE_NEWPID|syscall.CLONE_NEWNET|syscall.CLONE_NEWNS, signals)
	if err == nil && status == notPermitted || errors.Is(err, os.ErrPermission) {
		fmt.Fprintln(os.Stderr, "fleet: SKIPPED: NOTHING WAS TESTED, because namespaces of processes, networks and mounts are not permitted here; run it as root")
		return 0, nil
	}
	return status, err
}

// runStage runs this program again, as the first process of new namespaces, and passes
// signals on to it. The child is in a process group of its own, so that it gets each signal
// once.
func runStage(namespaces uintptr, signals <-chan os.Signal) (status int, err error) {
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), stageVar+"="+stageInit)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the child
	for {
		select {
		case s := <-signals:
			cmd.Process.Signal(s)
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				return max(1, exit.ExitCode()), nil // a signal is -1
			}
			return 0, err
		}
	}
}

// A part is one of the runs of this program, each with gateways of its own.
type part struct {
	name string
	run  func(*fleet, context.Context) error
	// aws starts the services of AWS and the table, and returns the environment of
	// programs that use them.
	aws func(context.Context, *fleet) (environ []string, err error)
}

var parts = []part{
	{"faults", (*fleet).faults, startFakes},
	{"upgrade", (*fleet).upgrade, startFakes},
	{"moto", (*fleet).moto, startMoto},
	{"crowd", (*fleet).crowd, startStandIns},
}

// inside is the run.
func inside() (status int, err error) {
	o, err := parseFlags(os.Args[1:], os.Stderr)
	if err != nil {
		return 2, err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	spawner := newSpawner()
	all := map[string]*results{}
	broken := false
	for _, p := range parts {
		if !o.run.MatchString(p.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().UTC().Format(time.TimeOnly), p.name)
		r, err := runPart(ctx, p, o, spawner)
		if err != nil {
			return 1, fmt.Errorf("%s: %w", p.name, err)
		}
		all[p.name] = r
		broken = broken || r.broken()
		fmt.Printf("\n%s\n\n", p.name)
		if err := r.print(os.Stdout); err != nil {
			return 1, err
		}
	}
	if o.json != "" {
		text, err := json.MarshalIndent(all, "", "\t")
		if err == nil {
			err = os.WriteFile(o.json, append(text, '\n'), 0o644)
		}
		if err != nil {
			return 1, err
		}
	}
	if broken {
		return 1, nil
	}
	return 0, nil
}

func runPart(ctx context.Context, p part, o options, s *spawner) (*results, error) {
	ctx, abort := context.WithCancelCause(ctx)
	defer abort(nil)
	f, err := newFleet(ctx, abort, p, o, s)
	if err != nil {
		return nil, err
	}
	defer f.close()
	err = p.run(f, ctx)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil || f.results.broken() {
		f.keep = true
	}
	return f.results, err
}
