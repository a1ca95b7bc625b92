package agent

import (
	"bufio"
	"io"
	"os"
	"strings"
)

// environmentFiles are the files that pam_env(8) reads for Debian's sshd, in this order.
var environmentFiles = []string{"/etc/environment", "/etc/default/locale"}

const (
	// maxEnvironmentFile is how many bytes of an environment file are read.
	maxEnvironmentFile = 1 << 20
	// maxEnvironmentLine is the size of pam_env's buffer for a line with its
	// continuations and a NUL.
	maxEnvironmentLine = 8192
)

// pamEnvironment returns the variables that environment files set. It skips files that it
// cannot read.
func pamEnvironment(files []string) []string {
	var env environ
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		env.readPAM(io.LimitReader(f, maxEnvironmentFile))
		f.Close()
	}
	return env.vars
}

// readPAM reads a file in the same way as pam_env of Linux-PAM 1.5, which sshd and login(1)
// use:
//
//   - A # starts a comment, even within quotes.
//   - A backslash at the end of a line continues it; white space may follow the
//     backslash. Blank lines and comments between continued lines are skipped.
//   - "export " at the start of a line is skipped. A name has ASCII letters, digits and _,
//     and = follows it immediately. A name alone removes the variable. Other lines are
//     skipped.
//   - If a value begins with " or ', that quote is removed, and a quote of either kind at
//     its end. White space at the end of a value is part of it. Nothing is expanded.
//   - A line that contains a NUL or has 8 KiB, or a continuation at the end of the file,
//     ends the reading.
func (e *environ) readPAM(r io.Reader) {
	for lines := bufio.NewReaderSize(r, maxEnvironmentLine); ; {
		line, ok := pamLine(lines)
		if !ok {
			return
		}
		line = strings.TrimPrefix(strings.TrimLeft(line, " \n\t"), "export ")
		line, _, _ = strings.Cut(line, "\n")
		name, value, isSet := strings.Cut(line, "=")
		switch {
		case name == "" || strings.Trim(name, nameChars) != "":
		case isSet:
			e.set(name, pamValue(value))
		default:
			e.unset(name)
		}
	}
}

const nameChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_"

// pamLine returns the next line that is not empty, with its continuations and without
// comments. It returns false where pam_env ends the reading.
func pamLine(r *bufio.Reader) (line string, ok bool) {
	for {
		next, err := r.ReadSlice('\n')
		piece, _, cut := strings.Cut(string(next), "\x00")
		if piece == "" || len(line)+len(next) >= maxEnvironmentLine || err != io.EOF && (err != nil || cut) {
			return "", false
		}
		content := strings.TrimLeft(piece, " \n\t")
		if content == "" || content[0] == '#' {
			continue
		}
		if piece, _, comment := strings.Cut(piece, "#"); comment {
			return line + piece, true
		}
		continued, ok := strings.CutSuffix(strings.TrimRight(piece, " \n\t"), `\`)
		if !ok {
			return line + piece, true
		}
		line += continued
	}
}

// pamValue removes the quotes around a value.
func pamValue(v string) string {
	if v == "" || v[0] != '"' && v[0] != '\'' {
		return v
	}
	v = v[1:]
	if n := len(v); n > 0 && (v[n-1] == '"' || v[n-1] == '\'') {
		v = v[:n-1]
	}
	return v
}
