package auth

import (
	"fmt"
	"path/filepath"
	"strings"
)

// backupSuffixes mark disabled, saved or unfinished copies of files, as people,
// editors, patch(1), and the package managers of Debian, Red Hat, Arch, Alpine and
// Gentoo name them. The dot before them is left out.
var backupSuffixes = map[string]bool{
	"bak": true, "backup": true, "old": true, "orig": true, "save": true, "saved": true, "sav": true, "copy": true,
	"disabled": true, "deleted": true, "removed": true, "revoked": true, "locked": true, "inactive": true, "off": true,
	"new": true, "tmp": true, "temp": true, "part": true, "swp": true, "swo": true, "rej": true,
	"pub": true, "example": true, "sample": true,
	"rpmsave": true, "rpmnew": true, "rpmorig": true,
	"dpkg-old": true, "dpkg-dist": true, "dpkg-new": true, "dpkg-tmp": true, "dpkg-bak": true, "dpkg-backup": true, "dpkg-remove": true,
	"ucf-old": true, "ucf-dist": true, "ucf-new": true, "ucf-tmp": true,
	"pacnew": true, "pacsave": true, "pacorig": true, "apk-new": true, "apk-old": true,
}

// checkName returns nil if name is a possible user name, and otherwise the reason.
//
// A user name has 1 to 64 ASCII letters and digits, ".", "_", "@" and "-", as in
// useradd(8) and in mail addresses. Characters with a meaning in a path, in a shell
// or in the "user+profile" of a login are not permitted. A name does not begin with
// "." or "-", and has no "..". No part of it after a dot is one of backupSuffixes, in
// upper or lower case, or a date or number of at least six digits: alice.bak is a
// backup, with keys that alice must not use any more.
func checkName(name string) error {
	bad := name == "" || len(name) > maxUser || name[0] == '-' || name[0] == '.' || strings.Contains(name, "..")
	for _, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c == '.', c == '_', c == '@', c == '-':
		default:
			bad = true
		}
	}
	if bad {
		return ErrName
	}
	for i, part := range strings.Split(name, ".") {
		digits := strings.Trim(part, "0123456789-_") == "" && len(part) >= 6
		if i > 0 && (backupSuffixes[strings.ToLower(part)] || digits) {
			return fmt.Errorf("a name with .%s in it is that of a backup file, not of a user", part)
		}
	}
	return nil
}

// CheckUser returns nil if name is a possible user name, and otherwise the reason.
func CheckUser(name string) error { return checkName(name) }

// ErrName is the reason if a name does not have the form of a user name.
var ErrName = fmt.Errorf("not a possible user name: it must be 1 to %d letters, digits and ._@-, and not begin with . or -", maxUser)

// validUser reports whether name is a possible user name.
func validUser(name string) bool { return checkName(name) == nil }

// misnamedFiles returns an error for each file of a folder with an impossible user
// name. Files whose names begin with a dot are ignored.
func misnamedFiles(dir *folder) ([]error, error) {
	names, err := dir.names()
	var problems []error
	for _, name := range names {
		if err := checkName(name); err != nil {
			problems = append(problems, misnamed(dir, name, err))
		}
	}
	return problems, err
}

func misnamed(dir *folder, name string, why error) error {
	if user, ok := strings.CutSuffix(name, ".pub"); ok && validUser(user) {
		why = fmt.Errorf("the name of a file is that of its user, here %s, without .pub", user)
	}
	return fmt.Errorf("%s: this file is ignored: %w", filepath.Join(dir.path, name), why)
}
