package policy

import (
	"errors"
	"slices"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// ErrNarrowed is the reason to end a login if its roles now permit less than at its
// start.
var ErrNarrowed = errors.New("the roles permit less than when the login began")

// Narrowed returns ErrNarrowed if now permits less than before, or records more. Both
// must be decisions for the same key, because options of the key are not compared.
// Limits are not compared either: they apply to later logins only.
func Narrowed(before, now identity.Permissions) error {
	type flag struct{ before, now bool }
	for _, permitted := range []flag{
		{before.PTY, now.PTY},
		{before.PortForwarding, now.PortForwarding},
		{before.AgentForwarding, now.AgentForwarding},
		{before.X11Forwarding, now.X11Forwarding},
		{before.UserRC, now.UserRC},
		{before.Admin, now.Admin},
		{!before.NoShell, !now.NoShell},
		{!before.NoExec, !now.NoExec},
		{!before.NoSFTP, !now.NoSFTP},
		{!before.RequirePTY, !now.RequirePTY},
	} {
		if permitted.before && !permitted.now {
			return ErrNarrowed
		}
	}
	if !before.Record.Includes(now.Record) || !covers(now.Destinations, before.Destinations) || !covers(now.Listen, before.Listen) {
		return ErrNarrowed
	}
	return nil
}

// covers reports whether every entry of small is in large. An empty list means no
// limit, a single "none" permits nothing; see [identity.Permissions].
func covers(large, small []string) bool {
	switch {
	case len(large) == 0:
		return true
	case len(small) == 0:
		return false
	}
	return !slices.ContainsFunc(small, func(entry string) bool { return entry != none && !slices.Contains(large, entry) })
}
