package auth

import (
	"context"
	"errors"
	"log/slog"
	"os"
)

// This file reports mistakes in the files: to the log, once per change, and to the
// caller of Check.

// A fileKind names a kind of file in messages.
type fileKind string

const (
	kindKeys       fileKind = "authorized keys"
	kindOwn        fileKind = "self-service keys"
	kindPrincipals fileKind = "authorized principals"
	kindCA         fileKind = "trusted user CA keys"
	kindRevoked    fileKind = "revoked keys"
	kindTOTP       fileKind = "totp_dir"
)

// A problemKey identifies a file: name is a user, a path, or empty for the folder.
type problemKey struct {
	kind fileKind
	name string
}

// report logs the problems of a file, unless they were the last ones logged for it.
func (k *Keys) report(kind fileKind, name string, problems []error) {
	if k.Log == nil {
		return
	}
	all := ""
	if len(problems) > 0 {
		all = errors.Join(problems...).Error()
	}
	key := problemKey{kind, name}
	k.mu.Lock()
	changed := k.lastReported[key] != all
	switch {
	case all == "":
		delete(k.lastReported, key)
	case changed:
		if k.lastReported == nil || len(k.lastReported) >= maxCached {
			k.lastReported = make(map[problemKey]string)
		}
		k.lastReported[key] = all
	}
	k.mu.Unlock()
	if !changed {
		return
	}
	level := slog.LevelWarn
	if kind == kindRevoked {
		level = slog.LevelError // every login is refused
	}
	user := slog.String("user", name)
	if !validUser(name) {
		user = slog.Attr{} // the errors have the path
	}
	// A file may have thousands of mistakes; Check lists all.
	const most = 20
	for i, err := range problems {
		if i == most {
			k.Log.LogAttrs(context.Background(), level, "more lines of "+string(kind)+" refused", user, slog.Int("count", len(problems)-i))
			break
		}
		k.Log.LogAttrs(context.Background(), level, string(kind)+" refused", user, slog.Any("err", err))
	}
}

// reportMisnamed logs the files of a folder with names that no user can have, once
// per change of the folder.
func (k *Keys) reportMisnamed(dir *folder, kind fileKind) {
	if k.Log == nil {
		return
	}
	k.mu.Lock()
	last, seen := k.dirStates[kind]
	if k.dirStates == nil {
		k.dirStates = make(map[fileKind]state)
	}
	k.dirStates[kind] = dir.state
	k.mu.Unlock()
	if seen && last == dir.state {
		return
	}
	problems, err := misnamedFiles(dir)
	if err != nil {
		problems = append(problems, err)
	}
	k.report(kind, dir.path, problems)
}

// LogMisnamed logs the files in Dir and AuthorizedPrincipalsDir with names that no
// user can have. Logins log later changes.
func (k *Keys) LogMisnamed() {
	for dir, kind := range map[string]fileKind{k.Dir: kindKeys, k.AuthorizedPrincipalsDir: kindPrincipals} {
		if dir == "" {
			continue
		}
		f, err := openDir(dir, kind)
		if err != nil {
			k.report(kind, "", []error{err})
			continue
		}
		k.reportMisnamed(f, kind)
		f.Close()
	}
}

// Check returns all mistakes in the files and settings of k: first those of the
// authorized keys, as the function [Check] returns them, then the others. It neither
// runs Command nor asks URL.
func (k *Keys) Check() []error {
	problems := Check(k.Dir)
	add := func(more []error, err error) {
		problems = append(problems, more...)
		if err != nil {
			problems = append(problems, err)
		}
	}
	for _, path := range k.TrustedUserCAKeys {
		d, err := readFile(path, maxFile, nil, parseCAKeys)
		if err == nil {
			add(d.problems, nil)
		} else {
			add(nil, err)
		}
	}
	if k.AuthorizedPrincipalsDir != "" {
		add(checkDir(k.AuthorizedPrincipalsDir, kindPrincipals, parsePrincipals), nil)
	}
	if k.SelfService != "" {
		if _, err := os.Stat(k.SelfService); err == nil { // the gateway creates it when it starts
			add(checkDir(k.SelfService, kindOwn, parseOwn), nil)
		}
	}
	if k.RevokedKeys != "" {
		_, err := readFile(k.RevokedKeys, maxRevoked, nil, parseRevocations)
		add(nil, err)
	}
	if len(k.Command) > 0 {
		_, err := k.command()
		add(nil, err)
	}
	if k.URL != "" {
		_, err := expandURL(k.URL, "user")
		add(nil, err)
	}
	return problems
}

// Check returns all mistakes in the authorized keys in dir, in the order of the
// files' names, as "path:line: reason" or "path: reason". Files whose names start
// with a dot are ignored.
func Check(dir string) []error { return checkDir(dir, kindKeys, parseFile) }

func checkDir[T any](dir string, kind fileKind, parse parser[T]) []error {
	root, err := openDir(dir, kind)
	if err != nil {
		return []error{err}
	}
	defer root.Close()
	names, err := root.names()
	if err != nil {
		return []error{err}
	}
	var problems []error
	for _, name := range names {
		if err := checkName(name); err != nil {
			problems = append(problems, misnamed(root, name, err))
			continue
		}
		d, err := readIn(root, name, maxFile, nil, parse)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		problems = append(problems, d.problems...)
	}
	return problems
}
