// Command gateway is the SSH server in front of every user's own bastion.
//
// gateway --help lists its commands, and gateway demo runs it without a
// configuration. Each command has a file. Logs are JSON lines on standard error.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/config"
	"github.com/sallyport-ssh/sallyport/internal/manpage"
	"github.com/sallyport-ssh/sallyport/internal/oplog"
	"github.com/sallyport-ssh/sallyport/internal/runas"
)

func main() {
	runas.Init()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process
	// A blocked reader of standard error must not block the process, nor its exit.
	stderr := oplog.NewWriter(os.Stderr)
	code := run(ctx, os.Args[1:], os.Stdout, stderr)
	stderr.Close()
	stop()
	os.Exit(code)
}

// commandLine has the commands and their flags.
type commandLine struct {
	Serve   serveCmd   `cmd:"" help:"Run a gateway. SIGHUP reloads the configuration. SIGTERM or SIGINT drains the gateway and ends it; a second one ends it at once. SIGUSR2 starts the program anew, hands the ports over to it, and drains this process."`
	Check   checkCmd   `cmd:"" help:"Report all mistakes in a configuration. Starts nothing. With --as, also answer what a user may do."`
	Demo    demoCmd    `cmd:"" help:"Run a gateway for yourself on this machine, without a configuration."`
	Play    playCmd    `cmd:"" help:"Play the recording of a session in this terminal."`
	Totp    totpCmd    `cmd:"" help:"Make secrets for verification codes. The users are asked for a code from then on; the secrets are printed for their apps."`
	Status  statusCmd  `cmd:"" help:"List the gateways that share a table, by their heartbeats in it."`
	Ledger  ledgerCmd  `cmd:"" help:"Make the table that several gateways share."`
	Cost    costCmd    `cmd:"" help:"Print the hours and the cost of bastions by user, from audit logs."`
	Ctl     ctlCmd     `cmd:"" help:"Start, find, list and stop bastions by the HTTP API of a gateway."`
	Help    helpCmd    `cmd:"" help:"Show help for a command."`
	Version versionCmd `cmd:"" help:"Print the version."`

	Completion completionCmd `cmd:"" help:"Print a completion script for bash, zsh or fish."`
	Manual     manualCmd     `cmd:"" hidden:"" help:"Print the commands in Markdown, for the manual page."`

	PrintVersion kong.VersionFlag `name:"version" help:"Print the version."`
}

// streams are the outputs of a command: out for its result, err for logs and
// messages.
type streams struct{ out, err io.Writer }

// run is main for one command line. It returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (code int) {
	exited := false
	parser, err := kong.New(&commandLine{},
		kong.Name("gateway"),
		kong.Description("An SSH gateway that gives each user her own bastion."),
		kong.Writers(stdout, stderr),
		kong.Exit(func(c int) { exited, code = true, c }),
		kong.Vars{"version": version()},
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(streams{stdout, stderr}),
	)
	if err != nil {
		panic(err) // a mistake in commandLine
	}
	if len(args) > 0 && args[0] == "help" {
		args = append(slices.Clone(args[1:]), "--help")
	}
	parsed, err := parser.Parse(args)
	if exited { // --help or --version
		return code
	}
	if err != nil {
		fmt.Fprintf(stderr, "gateway: %v\n", err)
		if strings.HasSuffix(err.Error(), ".yaml") {
			fmt.Fprintln(stderr, "Name a configuration with --config.")
		}
		fmt.Fprintln(stderr, `Run "gateway help" or "gateway help COMMAND" for help.`)
		return 2
	}
	if err := parsed.Run(); err != nil {
		printError(stderr, err)
		return 1
	}
	return 0
}

// printError prints err. Mistakes of a configuration have a line each, which begins
// with their place in the file.
func printError(w io.Writer, err error) {
	if mistakes := (config.Mistakes)(nil); errors.As(err, &mistakes) {
		fmt.Fprintln(w, mistakes)
		return
	}
	fmt.Fprintln(w, "gateway:", err)
}

// helpCmd lists "help" among the commands. run replaces it by --help before the
// command line is parsed.
type helpCmd struct {
	Command []string `arg:"" optional:"" help:"The command."`
}

type manualCmd struct{}

// Run prints the commands. packaging/build makes the manual page of them.
func (manualCmd) Run(k *kong.Context, s streams) error {
	_, err := io.WriteString(s.out, manpage.Commands(k.Model))
	return err
}

type versionCmd struct{}

// Run prints the version.
func (versionCmd) Run(s streams) error {
	_, err := fmt.Fprintln(s.out, version())
	return err
}

// release is the version of a packaged binary. The linker sets it (packaging/build).
var release string

// version returns the release of the binary, its module version, or the revision of its
// source.
func version() string {
	version := cmp.Or(release, "devel")
	if info, ok := debug.ReadBuildInfo(); ok && release == "" {
		if info.Main.Version != "" && info.Main.Version != "(devel)" {
			version = info.Main.Version
		}
		for _, kv := range info.Settings {
			if kv.Key == "vcs.revision" && version == "devel" {
				version += " " + kv.Value[:min(12, len(kv.Value))]
			}
		}
	}
	return fmt.Sprintf("sallyport gateway %s %s %s/%s", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func authorizedKey(k ssh.PublicKey) string { return string(ssh.MarshalAuthorizedKey(k)) }
