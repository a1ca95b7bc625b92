package console

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/audit"
	"github.com/sallyport-ssh/sallyport/internal/auth"
)

// This file holds the commands with which users manage keys that they have added
// themselves.

// Keys stores the keys that users have added. It is an [auth.Keys].
type Keys interface {
	ListOwn(user string) ([]auth.OwnKey, error)
	AddOwn(user, with, line string, from netip.Addr, now time.Time, commit func(auth.OwnKey) error) (auth.OwnKey, error)
	RemoveOwn(user, fingerprint string, commit func(auth.OwnKey) error) (auth.OwnKey, error)
}

const (
	// maxKeyInput, in bytes, and maxKeyLines limit the input of one "keys add".
	maxKeyInput = 64 << 10
	maxKeyLines = 20
)

var errNoKeys = userError("Users cannot add keys here; ask your administrator.")

// ownKeys returns the store of added keys, or nil if users may not add keys.
func (s *session) ownKeys() Keys {
	if s.console.OwnKeys == nil {
		return nil
	}
	return s.console.OwnKeys()
}

// keyJSON is a key in JSON output.
type keyJSON struct {
	Fingerprint string     `json:"fingerprint"`
	Type        string     `json:"type"`
	Comment     string     `json:"comment,omitempty"`
	Own         bool       `json:"own"`
	Added       *time.Time `json:"added"`
	From        string     `json:"from,omitempty"`
	With        string     `json:"with,omitempty"`
}

func toJSON(k auth.OwnKey) keyJSON {
	out := keyJSON{Fingerprint: k.Fingerprint, Type: k.Type, Comment: k.Comment, Own: !k.Added.IsZero(), Added: jsonTime(k.Added), With: k.With}
	if k.From.IsValid() {
		out.From = k.From.String()
	}
	return out
}

func (s *session) keysList(c call) error {
	keys := s.ownKeys()
	if keys == nil {
		return errNoKeys
	}
	all, err := keys.ListOwn(s.identity.User)
	if err != nil {
		return err
	}
	if c.json {
		out := []keyJSON{}
		for _, k := range all {
			out = append(out, toJSON(k))
		}
		return s.writeJSON(out)
	}
	return s.table(func(w *tabwriter.Writer) {
		fmt.Fprintln(w, "FINGERPRINT\tADDED\tCOMMENT")
		for _, k := range all {
			added, comment := "by administrator", ""
			if !k.Added.IsZero() {
				added, comment = age(k.Added)+" ago", sanitize(k.Comment)
			}
			fmt.Fprintf(w, "%s\t%s\t%s\n", k.Fingerprint, added, comment)
		}
	})
}

// keysAdd adds the line of the command, or the lines of standard input.
func (s *session) keysAdd(c call) error {
	keys := s.ownKeys()
	if keys == nil {
		return errNoKeys
	}
	lines := []string{c.rest}
	if c.rest == "" {
		if s.pty || s.kind != "exec" {
			return usageError("give the line of the public key after keys add or on standard input, as in: ssh USER+ctl@GATEWAY keys add < id_ed25519.pub")
		}
		var err error
		if lines, err = s.readKeys(); err != nil {
			return err
		}
	}
	added, failed := []keyJSON{}, false
	for _, line := range lines {
		k, err := keys.AddOwn(s.identity.User, s.identity.Key, line, s.identity.Client.Addr(), time.Now(), func(k auth.OwnKey) error {
			return s.audit(audit.Event{Type: audit.KeyAdded, Key: k.Fingerprint, AuthorizedBy: k.With})
		})
		var refused auth.KeyError
		switch {
		case errors.As(err, &refused) && len(lines) > 1:
			fmt.Fprintf(s.err, "Not added: %s (%s)\n", sanitizeTo(string(refused), maxSentence), sanitize(line))
			failed = true
			continue
		case errors.As(err, &refused):
			return userError("Not added: " + sanitizeTo(string(refused), maxSentence))
		case err != nil:
			return err
		}
		s.conn.log.Info("key added", "key", k.Fingerprint, "with", k.With)
		added = append(added, toJSON(k))
		if !c.json {
			if err := s.say("Added " + k.Fingerprint + ". It has the permissions of the key that you logged in with, and no more."); err != nil {
				return err
			}
		}
	}
	if c.json {
		if err := s.writeJSON(added); err != nil {
			return err
		}
	}
	if failed {
		return userError("Not all keys were added.")
	}
	return nil
}

// readKeys returns the lines of standard input, without empty lines and comments.
func (s *session) readKeys() ([]string, error) {
	text, err := io.ReadAll(io.LimitReader(s.lines, maxKeyInput+1))
	if err != nil {
		return nil, fmt.Errorf("reading keys: %w", err)
	}
	if len(text) > maxKeyInput {
		return nil, userError(fmt.Sprintf("The input has more than %d bytes; nothing was added.", maxKeyInput))
	}
	if strings.Contains(string(text), " PRIVATE KEY-----") {
		// The refusal of its lines would quote them.
		return nil, userError("Nothing was added: this is a private key. Send the public key, the file that ends in .pub, and replace the key if others may have read it.")
	}
	var lines []string
	scan := bufio.NewScanner(strings.NewReader(string(text)))
	scan.Buffer(nil, maxKeyInput+1)
	for scan.Scan() {
		if line := strings.TrimSpace(scan.Text()); line != "" && line[0] != '#' {
			lines = append(lines, line)
		}
	}
	switch {
	case scan.Err() != nil:
		return nil, fmt.Errorf("reading keys: %w", scan.Err())
	case len(lines) == 0:
		return nil, usageError("there is no key on standard input")
	case len(lines) > maxKeyLines:
		return nil, userError(fmt.Sprintf("The input has more than %d keys; nothing was added.", maxKeyLines))
	}
	return lines, nil
}

func (s *session) keysRemove(c call) error {
	keys := s.ownKeys()
	if keys == nil {
		return errNoKeys
	}
	if !c.yes {
		question := "Remove the key " + sanitize(c.args[0]) + "? Connections that logged in with it end."
		if strings.HasPrefix(s.identity.Key, c.args[0]) {
			question = "Remove the key that you logged in with? This console ends, too, and the next login needs another key."
		}
		if err := s.confirm(question); err != nil {
			return err
		}
	}
	k, err := keys.RemoveOwn(s.identity.User, c.args[0], func(k auth.OwnKey) error {
		return s.audit(audit.Event{Type: audit.KeyRemoved, Key: k.Fingerprint, AuthorizedBy: k.With})
	})
	var refused auth.KeyError
	if errors.As(err, &refused) {
		return userError("Not removed: " + sanitizeTo(string(refused), maxSentence))
	}
	if err != nil {
		return err
	}
	s.conn.log.Info("key removed", "key", k.Fingerprint)
	if c.json {
		return s.writeJSON(toJSON(k))
	}
	return s.say("Removed " + k.Fingerprint + ". Connections that logged in with it end within seconds.")
}

// isCopyID reports whether a command is the one with which ssh-copy-id appends standard
// input to ~/.ssh/authorized_keys. Here it means "keys add". All versions of ssh-copy-id
// match.
func isCopyID(command string) bool {
	return strings.HasPrefix(command, "exec sh -c 'cd") && strings.Contains(command, "umask 077") &&
		strings.Contains(command, "cat >>") && strings.Contains(command, ".ssh/authorized_keys")
}
