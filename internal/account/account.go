// Package account looks up accounts of this machine: their ids and groups, as
// getpwnam(3) and getgrouplist(3) return them, and whether and with which resource
// limits they may log in now, as the PAM modules pam_unix (expiry), pam_nologin and
// pam_limits decide at each login to sshd.
//
// Package os/user finds the accounts of directory services (LDAP, sssd, systemd-homed)
// only if it is built with cgo. So if an account is not in /etc/passwd, this package
// runs getent(1), and it runs id(1) for groups. Builds with and without cgo find the
// same accounts and groups.
package account

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"time"
)

// ErrUnknown is the error for an account that does not exist.
var ErrUnknown = errors.New("no such account")

// An Account is an entry of passwd(5), with the supplementary groups.
type Account struct {
	Name     string
	UID, GID uint32
	// Groups are the supplementary groups. They include GID.
	Groups []uint32
	Home   string
	// Shell is the login shell; empty means /bin/sh.
	Shell string
}

// Lookup returns the current entry and groups of the account with that name. If there is
// none, the error wraps [ErrUnknown]. Lookup runs getent and id, each for at most
// lookupTimeout.
func Lookup(name string) (Account, error) {
	if name == "" || strings.ContainsAny(name, ":\n\x00") || name[0] == '-' {
		return Account{}, fmt.Errorf("%q is not a valid account name: %w", name, ErrUnknown)
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil && !os.IsNotExist(err) {
		return Account{}, err
	}
	a, ok := find(passwd, name)
	if !ok {
		out, err := getent("passwd", name)
		if err != nil {
			return Account{}, err
		}
		if a, ok = find(out, name); !ok {
			return Account{}, fmt.Errorf("account %q: %w", name, ErrUnknown)
		}
	}
	if a.Groups, err = groups(a); err != nil {
		return Account{}, fmt.Errorf("looking up the groups of account %s: %w", name, err)
	}
	return a, nil
}

// LookupGroup returns the id of the group with that name.
func LookupGroup(name string) (uint32, error) {
	if name == "" || strings.ContainsAny(name, ":\n\x00") || name[0] == '-' {
		return 0, fmt.Errorf("%q is not a valid group name", name)
	}
	file, err := os.ReadFile("/etc/group")
	if err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	gid, ok := findGroup(file, name)
	if !ok {
		out, err := getent("group", name)
		if err != nil {
			return 0, err
		}
		if gid, ok = findGroup(out, name); !ok {
			return 0, fmt.Errorf("there is no group %q", name)
		}
	}
	return gid, nil
}

// findGroup finds name in the lines of a group(5) file. Lines can be long.
func findGroup(group []byte, name string) (gid uint32, ok bool) {
	for line := range bytes.Lines(group) {
		f := strings.Split(strings.TrimSuffix(string(line), "\n"), ":")
		if len(f) != 4 || f[0] != name {
			continue
		}
		if gid, err := strconv.ParseUint(f[2], 10, 32); err == nil {
			return uint32(gid), true
		}
	}
	return 0, false
}

// find finds name in the lines of a passwd(5) file.
func find(passwd []byte, name string) (Account, bool) {
	for lines := bufio.NewScanner(bytes.NewReader(passwd)); lines.Scan(); {
		f := strings.Split(lines.Text(), ":")
		if len(f) != 7 || f[0] != name {
			continue
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			continue
		}
		return Account{Name: name, UID: uint32(uid), GID: uint32(gid), Home: f[5], Shell: f[6]}, true
	}
	return Account{}, false
}

// groups returns the groups that id(1) prints. If id is not installed, it returns those
// that package os/user finds.
func groups(a Account) ([]uint32, error) {
	var ids []string
	out, err := runTool("id", "-G", "--", a.Name)
	switch {
	case errors.Is(err, exec.ErrNotFound):
		u := user.User{Username: a.Name, Uid: strconv.Itoa(int(a.UID)), Gid: strconv.Itoa(int(a.GID))}
		if ids, err = u.GroupIds(); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	default:
		ids = strings.Fields(string(out))
	}
	var groups []uint32
	for _, s := range ids {
		gid, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q is not a group id", s)
		}
		groups = append(groups, uint32(gid))
	}
	return groups, nil
}

// getent returns the output of getent(1), which is empty if there is no such entry.
func getent(database, name string) ([]byte, error) {
	out, err := runTool("getent", database, name)
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil // without getent there are no directory services
	}
	// Exit status 2 means that a key was not found.
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() == 2 {
		return nil, nil
	}
	return out, err
}

const (
	// lookupTimeout is how long getent and id may take.
	lookupTimeout = 20 * time.Second
	// maxOutput bounds their output, in bytes.
	maxOutput = 1 << 20
)

// runTool runs a program of the system and returns its output. It does not use the
// environment of this process, which may be empty. More output than maxOutput is an
// error.
func runTool(name string, args ...string) ([]byte, error) {
	var path string
	for _, dir := range []string{"/usr/bin/", "/bin/", "/usr/sbin/", "/sbin/"} {
		if _, err := os.Stat(dir + name); err == nil {
			path = dir + name
			break
		}
	}
	if path == "" {
		return nil, fmt.Errorf("%s: %w", name, exec.ErrNotFound)
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin", "LC_ALL=C"}
	cmd.WaitDelay = time.Second
	var out limitedBuffer
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w", path, strings.Join(args, " "), err)
	}
	return out.Bytes(), nil
}

// limitedBuffer is a buffer for up to maxOutput bytes.
type limitedBuffer struct{ bytes.Buffer }

// Write implements [io.Writer].
func (l *limitedBuffer) Write(p []byte) (int, error) {
	if l.Len()+len(p) > maxOutput {
		return 0, io.ErrShortWrite
	}
	return l.Buffer.Write(p)
}

// Tests replace these.
var (
	shadowFile   = "/etc/shadow"
	nologinFiles = []string{"/var/run/nologin", "/etc/nologin"}
)

// Reasons why an account may not log in.
var (
	// ErrExpired means that the account's day of expiry has come (chage -E).
	ErrExpired = errors.New("the account has expired")
	// ErrNologin means that there is a nologin file. Only root may log in then.
	ErrNologin = errors.New("logins are disabled by a nologin file")
)

// A DeniedError is the error for an account that may not log in.
type DeniedError struct {
	// Text is the message to the user: one or more lines.
	Text string
	// Err is the reason.
	Err error
}

func (e *DeniedError) Error() string { return e.Err.Error() }
func (e *DeniedError) Unwrap() error { return e.Err }

// MayLogin returns nil if the account may log in at that time, or a [*DeniedError]. If
// this process may not read /etc/shadow, MayLogin assumes that the account has not
// expired. As with PAM, a locked password does not deny a login with a key.
func (a Account) MayLogin(now time.Time) error {
	shadow, readErr := os.ReadFile(shadowFile)
	if readErr == nil {
		expiry, found := findExpiry(shadow, a.Name)
		if !found {
			if out, err := getent("shadow", a.Name); err == nil {
				expiry, _ = findExpiry(out, a.Name)
			}
		}
		// As in pam_unix, days are in UTC and the account expires as its day begins.
		if expiry >= 0 && now.Unix()/(24*60*60) >= expiry {
			return &DeniedError{"Your account has expired; please contact your system administrator.\n", ErrExpired}
		}
	}
	if a.UID == 0 {
		return nil
	}
	for _, file := range nologinFiles {
		f, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		text := []byte("The system is not available for logins at the moment.\n")
		if err == nil { // a nologin file that cannot be read denies logins, too
			if content, err := io.ReadAll(io.LimitReader(f, 16<<10)); err == nil && len(content) > 0 {
				text = content
			}
			f.Close()
		}
		return &DeniedError{string(text), fmt.Errorf("%w: %s", ErrNologin, file)}
	}
	return nil
}

// findExpiry returns the day on which an account expires, in days since 1970, from the
// lines of a shadow(5) file. It returns -1 if the account does not expire.
func findExpiry(shadow []byte, name string) (day int64, found bool) {
	for line := range bytes.Lines(shadow) {
		f := strings.Split(strings.TrimSuffix(string(line), "\n"), ":")
		if len(f) < 8 || f[0] != name {
			continue
		}
		if day, err := strconv.ParseInt(f[7], 10, 64); err == nil && day >= 0 {
			return day, true
		}
		return -1, true
	}
	return -1, false
}
