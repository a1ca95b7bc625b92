package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"image/color"
	"io"
	"os"
	"strings"

	"github.com/boombuler/barcode/qr"
	"golang.org/x/term"

	"github.com/sallyport-ssh/sallyport/internal/auth"
	"github.com/sallyport-ssh/sallyport/internal/daemon"
)

type totpCmd struct {
	Config string   `default:"/etc/sallyport/gateway.yaml" placeholder:"FILE" help:"The configuration file; it must have totp_dir (default /etc/sallyport/gateway.yaml)."`
	From   string   `placeholder:"LIST" help:"A file with one user per line, or - for standard input."`
	QR     *bool    `name:"qr" negatable:"" help:"Draw a QR code for the app (default: only on a terminal)."`
	Users  []string `arg:"" optional:"" name:"user" help:"Users that need a secret."`
}

// Run makes a secret for each user and prints it as an otpauth URL. If it fails for
// a user, it goes on with the others.
func (c *totpCmd) Run(ctx context.Context, s streams) error {
	cfg, err := daemon.LoadConfig(ctx, c.Config, "")
	if err != nil {
		return err
	}
	if cfg.TOTPDir == "" {
		return fmt.Errorf("%s: there is no totp_dir; name a folder, and restart the gateway", c.Config)
	}
	if copied, ok := cfg.CopyAt(cfg.TOTPDir); ok {
		return fmt.Errorf("%s: totp_dir is %s, and this command writes files only; use a configuration with a folder, and store each file with aws ssm put-parameter --type SecureString", c.Config, copied.Reference)
	}
	users := c.Users
	if c.From != "" {
		listed, err := readList(c.From)
		if err != nil {
			return err
		}
		users = append(users, listed...)
	}
	if len(users) == 0 {
		return errors.New("name a user, or --from a list of users")
	}
	draw := isTerminal(s.out)
	if c.QR != nil {
		draw = *c.QR
	}
	var problems []error
	for _, user := range users {
		text, err := (&auth.TOTP{Dir: cfg.TOTPDir}).Enroll(user, "Sallyport")
		if err != nil {
			problems = append(problems, err)
			continue
		}
		if draw {
			fmt.Fprintf(s.out, "%s: scan this with the authenticator app. It is a secret.\n\n", user)
			if err := drawQR(s.out, text); err != nil {
				problems = append(problems, err)
			}
		}
		if _, err := fmt.Fprintln(s.out, text); err != nil {
			return err
		}
	}
	return errors.Join(problems...)
}

// readList returns the lines of a file without empty ones and comments.
func readList(path string) ([]string, error) {
	file := os.Stdin
	if path != "-" {
		var err error
		if file, err = os.Open(path); err != nil {
			return nil, err
		}
		defer file.Close()
	}
	var all []string
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && line[0] != '#' {
			all = append(all, line)
		}
	}
	return all, lines.Err()
}

func isTerminal(out io.Writer) bool {
	file, ok := out.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

// drawQR draws a QR code of the text, with the quiet zone of four modules that
// scanners need (ISO/IEC 18004). Two rows of modules are a row of characters. It
// draws black on white, by the numbers of these colours among 256, because default
// colours differ between dark and light terminals, and many scanners do not read
// inverted codes.
func drawQR(out io.Writer, text string) error {
	code, err := qr.Encode(text, qr.L, qr.Auto)
	if err != nil {
		return fmt.Errorf("drawing the QR code: %w", err)
	}
	const quiet = 4
	size := code.Bounds().Dx()
	black := func(x, y int) bool {
		return x >= 0 && y >= 0 && x < size && y < size && color.GrayModel.Convert(code.At(x, y)).(color.Gray).Y < 128
	}
	var b strings.Builder
	for y := -quiet; y < size+quiet; y += 2 {
		b.WriteString("\x1b[38;5;16;48;5;231m")
		for x := -quiet; x < size+quiet; x++ {
			switch top, bottom := black(x, y), black(x, y+1); {
			case top && bottom:
				b.WriteRune('█')
			case top:
				b.WriteRune('▀')
			case bottom:
				b.WriteRune('▄')
			default:
				b.WriteByte(' ')
			}
		}
		b.WriteString("\x1b[0m\n")
	}
	_, err = io.WriteString(out, b.String())
	return err
}
