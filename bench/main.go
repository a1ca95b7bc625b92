// Command bench measures Sallyport beside Debian's sshd, on this machine and in
// one run, with the stock ssh client, and prints the ratios.
//
//	go run ./bench                   everything; about half an hour
//	go run ./bench -quick            everything, with small numbers; a few minutes
//	go run ./bench -run 'cpu|connect'
//	go run ./bench -markdown         the table of docs/performance.md
//
// Each measurement alternates between the two servers, because the load of a
// machine changes; the result is the ratio of the medians. There is no pass or
// fail.
//
// The program builds the gateway and the agent of the working directory's
// module, starts them and a private sshd on loopback ports, and stops every
// process that it has started at the end or when it is interrupted.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

// settings are the sizes of the measurements; the flags in run explain them.
type settings struct {
	size        int64
	rounds      int
	clients     int
	sshdClients int
	settle      time.Duration
	keystrokes  int
	connects    int
	idleClients int
	idle        time.Duration
	coldStarts  int

	shortConnections int
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == peerArg {
		fmt.Fprintln(os.Stderr, "bench:", servePeer())
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	var (
		set      settings
		flags    = flag.NewFlagSet("bench", flag.ContinueOnError)
		only     = flags.String("run", "", "run only the sections whose name matches this `regexp`")
		quick    = flags.Bool("quick", false, "smaller numbers, except for those set by their own flags")
		markdown = flags.Bool("markdown", false, "print a Markdown table in place of the plain one")
		jsonFile = flags.String("json", "", "also write the report to this `file`")
		earlier  = flags.String("compare", "", "print the change against the report in this `file`, if there is one")
		keepDir  = flags.String("dir", "", "keep configuration and logs in this `folder`, created if it does not exist (default: a temporary one)")
		sizeMiB  = flags.Int64("size", 2048, "`MiB` per transfer through -L")
		gateway  = flags.String("gateway", "", "measure this gateway `binary` in place of a fresh build (bastion-agent must lie beside it)")
		gwEnv    = flags.String("env", "", "extra `NAME=value` for the gateway's environment, such as GODEBUG=gctrace=1")
	)
	flags.SetOutput(stderr)
	flags.IntVar(&set.rounds, "rounds", 5, "transfers per server and direction")
	flags.IntVar(&set.clients, "clients", 200, "connections held open to measure the gateway's memory")
	flags.IntVar(&set.sshdClients, "sshd-clients", 20, "connections held open to measure sshd's memory")
	flags.DurationVar(&set.settle, "settle", 150*time.Second, "time for memory to settle; Go collects an idle heap every 2 minutes")
	flags.IntVar(&set.keystrokes, "keystrokes", 2000, "keystrokes per server")
	flags.IntVar(&set.connects, "connects", 60, "runs of `ssh HOST true` per server")
	flags.IntVar(&set.idleClients, "idle-clients", 10000, "connections of the idle section")
	flags.DurationVar(&set.idle, "idle", 10*time.Minute, "duration of the idle section")
	flags.IntVar(&set.shortConnections, "short", 20000, "connections of the leaks section")
	flags.IntVar(&set.coldStarts, "cold-starts", 200, "bastions started on the imitation of Fargate")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if *quick {
		given := map[string]bool{}
		flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
		for name, value := range map[string]string{
			"size": "256", "rounds": "3", "clients": "50", "sshd-clients": "5", "settle": "10s",
			"keystrokes": "300", "connects": "10", "idle-clients": "1000", "idle": "60s", "cold-starts": "20", "short": "1000",
		} {
			if !given[name] {
				flags.Set(name, value)
			}
		}
	}
	set.size = *sizeMiB << 20
	wanted, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}

	loadBefore := loadAverage()
	log := slog.New(slog.NewTextHandler(stderr, nil))
	b, err := start(ctx, *keepDir, *gateway, *gwEnv, set, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()

	report := report{Machine: machine(ctx), Args: args}
	for _, s := range []struct {
		name string
		run  func(context.Context) ([]row, error)
	}{
		{"cpu, throughput", b.transfers},
		{"keystroke", b.keystroke},
		{"connect", b.connect},
		{"memory", b.memory},
		{"idle", b.idle},
		{"leaks", b.short},
		{"coldstart", b.coldStart},
		{"lines", countLines},
	} {
		if !wanted.MatchString(s.name) {
			continue
		}
		log.Info("measuring", "section", s.name)
		rows, err := s.run(ctx)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		report.Rows = append(report.Rows, rows...)
	}
	report.Load = fmt.Sprintf("Load average %s before, %s after", loadBefore, loadAverage())
	print := report.plain
	if *markdown {
		print = report.markdown
	}
	if err := print(stdout); err != nil {
		return err
	}
	if *earlier != "" {
		switch last, err := readReport(*earlier); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		default:
			fmt.Fprintln(stdout)
			if err := report.compare(stdout, last); err != nil {
				return err
			}
		}
	}
	if *jsonFile == "" {
		return nil
	}
	return report.writeJSON(*jsonFile)
}
