package auth

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

// A keyFile has the lines of one user's authorized keys.
type keyFile struct {
	name    string             // for logs
	entries map[string][]entry // by the key's wire format, in the order of the file
}

// parseFile parses every line, and keeps those without a mistake.
func parseFile(path string, data []byte) (*keyFile, []error, error) {
	return parseKeys(path, data, nil)
}

// parseKeys is parseFile with a function that may refuse lines by their options.
func parseKeys(path string, data []byte, refuse func(options) error) (*keyFile, []error, error) {
	f := &keyFile{name: filepath.Base(path), entries: make(map[string][]entry)}
	var problems []error
	n := 0
	for line := range bytes.SplitSeq(data, []byte("\n")) {
		n++
		e, err := parseLine(string(line), time.Local)
		if err == nil && e.key != nil && refuse != nil {
			err = refuse(e.options)
		}
		if err != nil {
			problems = append(problems, fmt.Errorf("%s:%d: %w", path, n, err))
			continue
		}
		if e.key == nil {
			continue
		}
		e.line = n
		blob := string(e.key.Marshal())
		f.entries[blob] = append(f.entries[blob], e)
	}
	return f, problems, nil
}

// match returns the grant of the first line that fits the attempt. known reports
// whether any line has its key, or the authority of its certificate.
func (f *keyFile) match(a *attempt) (g Grant, known bool, err error) {
	key := a.key
	if a.cert != nil {
		key = a.cert.SignatureKey
	}
	err = a.errUnknownKey()
	for _, e := range f.entries[string(key.Marshal())] {
		if e.authority != (a.cert != nil) {
			continue
		}
		at := fmt.Sprintf("%s:%d", f.name, e.line)
		known = true
		if a.cert != nil {
			g, err = a.byCertificate(&e.options, e.principals)
		} else {
			g, err = e.grant(a)
		}
		if err == nil {
			g.Line = at
			return g, true, nil
		}
		err = fmt.Errorf("%s: %w", at, err)
	}
	return Grant{}, known, err
}

// byDir asks the user's file in Dir.
func (k *Keys) byDir(a *attempt) (Grant, bool, error) {
	for tries := 0; ; tries++ {
		d, err := k.file(a.user)
		if err != nil {
			return Grant{}, false, err
		}
		if a.hasFile = d != nil; !a.hasFile {
			return Grant{}, false, a.errUnknownKey()
		}
		g, known, err := d.content.match(a)
		if err == nil {
			g.Source = sourceDir
			return g, true, nil
		}
		if !d.halfWritten() || tries == halfWrittenRetries {
			return g, known, err
		}
		time.Sleep(halfWrittenDelay)
	}
}

// file returns the user's authorized keys as they are on disk, or nil if there is
// no file.
func (k *Keys) file(user string) (*document[*keyFile], error) {
	return userFile(k, &k.keys, k.Dir, kindKeys, user, parseFile)
}

// check returns why the options do not permit the attempt, or nil.
func (o *options) check(a *attempt) error {
	switch {
	case o.from != nil && !o.from.match(a.from):
		return fmt.Errorf("the key may not be used from %v", a.from)
	case !o.expires.IsZero() && a.now.After(o.expires):
		return fmt.Errorf("the key %w at %s", ErrExpired, o.expires.Format(time.RFC3339))
	}
	return nil
}

// grant returns the permissions of the options, which the caller may change.
func (o *options) grant(a *attempt) (Grant, error) {
	if err := o.check(a); err != nil {
		return Grant{}, err
	}
	p := o.permissions
	p.PermitOpen = slices.Clone(p.PermitOpen)
	p.PermitListen = slices.Clone(p.PermitListen)
	p.Environment = slices.Clone(p.Environment)
	return Grant{Permissions: p, NoTouchRequired: o.noTouch, VerifyRequired: o.verify, Expires: o.expires}, nil
}

// intersect removes from g all that by does not permit. An option that both have,
// and that cannot be combined, is an error; its text follows a subject such as "the
// certificate and the line".
func (g *Grant) intersect(by Grant) error {
	p, q := &g.Permissions, &by.Permissions
	p.PTY = p.PTY && q.PTY
	p.PortForwarding = p.PortForwarding && q.PortForwarding
	p.AgentForwarding = p.AgentForwarding && q.AgentForwarding
	p.X11Forwarding = p.X11Forwarding && q.X11Forwarding
	p.UserRC = p.UserRC && q.UserRC
	p.Environment = slices.Concat(p.Environment, q.Environment)
	switch {
	case p.ForceCommand == "":
		p.ForceCommand = q.ForceCommand
	case q.ForceCommand != "" && q.ForceCommand != p.ForceCommand:
		return errDifferentCommands
	}
	for _, list := range []struct {
		name  string
		g, by *[]string
	}{{"permitopen", &p.PermitOpen, &q.PermitOpen}, {"permitlisten", &p.PermitListen, &q.PermitListen}} {
		switch {
		case len(*list.g) == 0:
			*list.g = *list.by
		case len(*list.by) > 0:
			return fmt.Errorf("both have %s", list.name)
		}
	}
	if g.Expires.IsZero() || !by.Expires.IsZero() && by.Expires.Before(g.Expires) {
		g.Expires = by.Expires
	}
	g.NoTouchRequired = g.NoTouchRequired && by.NoTouchRequired
	g.VerifyRequired = g.VerifyRequired || by.VerifyRequired
	return nil
}

var errDifferentCommands = errors.New("force different commands")

// isFIDO reports whether key is held by a security key.
func isFIDO(key ssh.PublicKey) bool {
	return key.Type() == ssh.KeyAlgoSKED25519 || key.Type() == ssh.KeyAlgoSKECDSA256
}
