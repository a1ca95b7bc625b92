package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
	"golang.org/x/crypto/ssh"
)

// parse makes a Gateway of the text of a file. file is its name in the mistakes, dir is
// where relative paths start.
func parse(data []byte, file, dir string) (*Gateway, error) {
	r := &report{file: file}
	root, err := document(data)
	if err != nil {
		r.syntax(err)
		return nil, r.err()
	}
	g := Defaults()
	v := value{node: root, dir: dir, report: r}
	hostKeyTypes := map[string]int{} // line by type of key
	var roles *value

	seen := v.mapping(map[string]func(value){
		"listen": func(v value) {
			g.Listen = nil
			for _, v := range v.list() {
				if addr := v.address(); slices.Contains(g.Listen, addr) {
					v.mistake("%q is listed twice", addr)
				} else {
					g.Listen = append(g.Listen, addr)
				}
			}
		},
		"host_keys": func(v value) {
			for _, v := range v.list() {
				key := v.privateKey()
				if key == nil {
					continue
				}
				// Package ssh keeps the last key of a type only.
				typ := key.PublicKey().Type()
				if line, ok := hostKeyTypes[typ]; ok {
					v.mistake("a second %s key (the first is in line %d); clients are shown one of each type", typ, line)
					continue
				}
				hostKeyTypes[typ] = v.node.Line
				g.HostKeys = append(g.HostKeys, key)
			}
		},
		"fleet_key":           func(v value) { g.FleetKey = v.privateKey() },
		"authorized_keys_dir": func(v value) { g.AuthorizedKeysDir = v.folder() },
		"totp_dir":            func(v value) { g.TOTPDir = v.folder() },
		"state_dir":           func(v value) { g.StateDir = v.path() },

		"trusted_user_ca_keys":         func(v value) { g.TrustedUserCAKeys = v.files() },
		"authorized_principals_dir":    func(v value) { g.AuthorizedPrincipalsDir = v.folder() },
		"revoked_keys":                 func(v value) { g.RevokedKeys = v.fileOrNone() },
		"authorized_keys_command":      func(v value) { g.AuthorizedKeysCommand = v.keysCommand() },
		"authorized_keys_command_user": func(v value) { g.AuthorizedKeysCommandUser = v.account() },
		"authorized_keys_url":          func(v value) { g.AuthorizedKeysURL = v.keysURL() },
		"authorized_keys_timeout":      func(v value) { g.AuthorizedKeysTimeout = v.durationUpTo(time.Minute) },
		"authorized_keys_cache":        func(v value) { g.AuthorizedKeysCache = v.durationUpTo(time.Hour) },
		"authorized_keys_stale":        func(v value) { g.AuthorizedKeysStale = v.durationUpTo(24 * time.Hour) },

		"proxy_protocol_from":            func(v value) { g.ProxyProtocolFrom = v.balancers() },
		"per_source_net_block_size":      func(v value) { g.PerSourceNetBlockSize = v.netBlockSize() },
		"per_source_penalties":           func(v value) { g.PerSourcePenalties = v.penalties() },
		"per_source_penalty_exempt_list": func(v value) { g.PerSourcePenaltyExemptList = v.networksOrNone() },

		"deployment": func(v value) {
			var ok bool
			if g.Deployment, ok = v.text(); ok && !validName(g.Deployment) {
				v.mistake("%q is not a name; write 1 to 32 letters, digits, - and _, a letter or digit first", g.Deployment)
			}
		},

		"login_grace_time":         func(v value) { g.LoginGraceTime = v.duration(time.Second) },
		"max_startups":             func(v value) { g.MaxStartups = v.maxStartups() },
		"per_source_max_startups":  func(v value) { g.PerSourceMaxStartups = v.integerOrNone() },
		"starts_per_user":          func(v value) { g.StartsPerUser = v.startRate() },
		"max_auth_tries":           func(v value) { g.MaxAuthTries = v.integer(1, 100) },
		"max_sessions":             func(v value) { g.MaxSessions = v.integer(1, 10_000) },
		"max_connections_per_user": func(v value) { g.MaxConnectionsPerUser = v.integer(1, 1_000_000) },
		"max_memory":               func(v value) { g.MaxMemory = v.sizeOrAuto(64<<20, 1<<40) },
		"client_alive_interval":    func(v value) { g.ClientAliveInterval = v.duration(time.Second) },
		"client_alive_count_max":   func(v value) { g.ClientAliveCountMax = v.integer(1, 1000) },
		"drain":                    func(v value) { g.Drain = v.duration(0) },
		"ciphers":                  func(v value) { g.Ciphers = v.algorithms("cipher", ciphers) },
		"macs":                     func(v value) { g.MACs = v.algorithms("MAC", macs) },
		"kex_algorithms":           func(v value) { g.KexAlgorithms = v.algorithms("key exchange", ssh.SupportedAlgorithms().KeyExchanges) },
		"version_addendum":         func(v value) { g.VersionAddendum = v.versionAddendum() },
		"banner":                   func(v value) { g.Banner = v.banner() },
		"profiles":                 func(v value) { v.profiles(g.Profiles) },
		"audit":                    func(v value) { v.audit(&g.Audit) },
		"recordings":               func(v value) { v.recordings(&g.Recordings) },
		"roles":                    func(v value) { roles = &v }, // they name profiles
	})
	if roles != nil {
		g.Roles = roles.roles(g.Profiles)
	}

	for _, required := range []struct{ key, hint string }{
		{"authorized_keys_dir", "name the folder with one authorized_keys file per user"},
		{"fleet_key", `name a private key that only gateways have; make one with ssh-keygen -t ed25519 -N "" -f FILE`},
		{"host_keys", `name at least one private key; make one with ssh-keygen -t ed25519 -N "" -f FILE`},
	} {
		if !seen[required.key] {
			r.add(0, "%s is missing; %s", required.key, required.hint)
		}
	}
	if g.FleetKey != nil {
		for _, key := range g.HostKeys {
			if bytes.Equal(key.PublicKey().Marshal(), g.FleetKey.PublicKey().Marshal()) {
				r.add(v.lineOf("fleet_key"), "fleet_key: is a host key as well; who signs logins to bastions must do nothing else")
			}
		}
	}
	v.checkAuth(&g.Auth)
	if err := r.err(); err != nil {
		return nil, err
	}
	return g, nil
}

// profiles adds to profiles what the file says of each.
func (v value) profiles(profiles map[string]Profile) {
	v.entries(func(name string, v value) {
		switch {
		case !validName(name):
			v.mistake("%q is not a name for a profile; write 1 to 32 letters, digits, - and _, a letter or digit first", name)
		case name == "ctl":
			v.mistake("the name ctl is taken: it is how users reach their console")
		}
		p := defaultProfile()
		seen := v.mapping(map[string]func(value){
			"launcher": func(v value) {
				var ok bool
				switch p.Launcher, ok = v.text(); {
				case !ok, p.Launcher == "local", p.Launcher == "fargate":
				default:
					v.mistake("%q is not a launcher; there are local and fargate", p.Launcher)
				}
			},
			"idle":          func(v value) { p.Idle = v.duration(time.Second) },
			"max_life":      func(v value) { p.MaxLife = v.duration(time.Second) },
			"start_timeout": func(v value) { p.StartTimeout = v.duration(time.Second) },
			"record":        func(v value) { p.Record = v.record() },
			"local": func(v value) {
				v.mapping(map[string]func(value){
					"account":    func(v value) { p.Local.Account = v.account() },
					"agent":      func(v value) { p.Local.Agent = v.path() },
					"accept_env": func(v value) { p.Local.AcceptEnv = v.envPatterns() },
				})
			},
			"fargate": func(v value) { v.fargate(&p.Fargate) },
		})
		if p.Launcher == "fargate" && !seen["fargate"] {
			v.mistake("the launcher fargate needs the key fargate, with at least cluster, task_definition and subnets")
		}
		if p.Idle > 0 && p.MaxLife > 0 && p.MaxLife < p.Idle {
			v.mistake("max_life (%v) is shorter than idle (%v)", p.MaxLife, p.Idle)
		}
		profiles[name] = p
	})
}

// document returns the root of the only document in data, or nil if there is
// nothing in it.
func document(data []byte) (*yaml.Node, error) {
	loader, err := yaml.NewLoader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	var doc, second yaml.Node
	switch err := loader.Load(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, err
	}
	switch err := loader.Load(&second); {
	case err == nil:
		return nil, &yaml.LoadError{Message: "a second document; there may be only one", Mark: yaml.Mark{Line: second.Line}}
	case !errors.Is(err, io.EOF):
		return nil, err
	}
	if doc.Kind == yaml.DocumentNode {
		if len(doc.Content) == 0 {
			return nil, nil
		}
		return doc.Content[0], nil
	}
	return &doc, nil
}

// A report collects mistakes.
type report struct {
	file     string // its name in the mistakes
	mistakes []mistake
}

type mistake struct {
	line int // 0: of the whole file
	text string
}

func (r *report) add(line int, format string, args ...any) {
	r.mistakes = append(r.mistakes, mistake{line, fmt.Sprintf(format, args...)})
}

// syntax adds what package yaml said.
func (r *report) syntax(err error) {
	if load := (*yaml.LoadError)(nil); errors.As(err, &load) {
		if load.Mark.Line > 0 {
			r.add(load.Mark.Line, "not valid YAML: %s", load.Message)
			return
		}
		err = errors.New(load.Message)
	}
	r.add(0, "not valid YAML: %v", err)
}

// err returns all mistakes by line, those of the whole file last; nil if there
// are none.
func (r *report) err() error {
	slices.SortStableFunc(r.mistakes, func(a, b mistake) int {
		switch {
		case a.line == b.line:
			return strings.Compare(a.text, b.text)
		case a.line == 0:
			return 1
		case b.line == 0:
			return -1
		}
		return a.line - b.line
	})
	var errs []error
	for _, m := range r.mistakes {
		at := r.file
		if m.line > 0 {
			at = fmt.Sprintf("%s:%d", r.file, m.line)
		}
		errs = append(errs, fmt.Errorf("%s: %s", at, m.text))
	}
	return errors.Join(errs...)
}

// A value is a place in the file. Its methods read it as what it should be; if
// it is not that, they report the mistake and return a zero value.
type value struct {
	node *yaml.Node // nil: an empty file
	name string     // as in profiles.default.idle; empty for the root
	dir  string     // where relative paths start
	*report
}

// mistake reports one at this value.
func (v value) mistake(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if v.name != "" {
		text = v.name + ": " + text
	}
	line := 0
	if v.node != nil {
		line = v.node.Line
	}
	v.add(line, "%s", text)
}

// resolve returns the node an alias stands for.
func resolve(n *yaml.Node) *yaml.Node {
	if n != nil && n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func (v value) isNull() bool {
	n := resolve(v.node)
	return n == nil || n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// child is the value called name in v.
func (v value) child(name string, node *yaml.Node) value {
	if v.name != "" {
		name = v.name + "." + name
	}
	v.name, v.node = name, node
	return v
}

// entries calls f for each entry of a mapping, in the order of the file. An
// empty value is a mapping without entries.
func (v value) entries(f func(name string, v value)) {
	if v.isNull() {
		return
	}
	node := resolve(v.node)
	if node.Kind != yaml.MappingNode {
		v.mistake("must have keys and values under it")
		return
	}
	lines := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		k, content := resolve(node.Content[i]), node.Content[i+1]
		name := k.Value
		entry := v.child(name, content)
		switch {
		case k.Kind != yaml.ScalarNode || name == "":
			v.child("?", node.Content[i]).mistake("a key must be a word")
			continue
		case name == "<<":
			v.child("<<", node.Content[i]).mistake("merging is not supported; write the values out, or use an alias for one value")
			continue
		case lines[name] > 0:
			v.child(name, node.Content[i]).mistake("given twice; the first is in line %d", lines[name])
			continue
		}
		lines[name] = node.Content[i].Line
		// What is written on the line of the key and of nothing else has the
		// key's line, for that is where people look.
		if content.Kind != yaml.ScalarNode {
			at := *content
			at.Line = node.Content[i].Line
			entry.node = &at
		}
		f(name, entry)
	}
}

// mapping reads each entry with the function for its key, and returns the keys
// that are there.
func (v value) mapping(fields map[string]func(value)) map[string]bool {
	seen := map[string]bool{}
	v.entries(func(name string, v value) {
		read, ok := fields[name]
		switch {
		case !ok:
			v.mistake("%s", unknown(name, fields))
			return
		case v.isNull() && name != "profiles" && name != "local" && name != "fargate": // empty mappings are fine
			v.mistake("has no value")
		default:
			read(v)
		}
		seen[name] = true
	})
	return seen
}

// unknown says that there is no such key, and which one may be meant.
func unknown(name string, fields map[string]func(value)) string {
	best, distance := "", 3
	for known := range fields {
		if d := editDistance(fold(name), fold(known)); d < distance || d == distance && known < best {
			best, distance = known, d
		}
	}
	if best == "" {
		return "unknown key"
	}
	return "unknown key; do you mean " + best + "?"
}

// fold makes HostKeys, host-keys and host_keys the same.
func fold(s string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s))
}

// editDistance is how many bytes must be added, removed or replaced (the
// distance of Levenshtein). Long words are far from everything.
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// lineOf returns where the key called name stands in v.
func (v value) lineOf(name string) int {
	line := 0
	quiet := v
	quiet.report = &report{}
	quiet.entries(func(n string, v value) {
		if n == name {
			line = v.node.Line
		}
	})
	return line
}

// list returns the values of a list. A single value is a list of one.
func (v value) list() []value {
	node := resolve(v.node)
	switch node.Kind {
	case yaml.ScalarNode:
		return []value{v}
	case yaml.SequenceNode:
		if len(node.Content) == 0 {
			v.mistake("the list is empty")
		}
		var vs []value
		for _, n := range node.Content {
			item := v
			item.node = n
			if item.isNull() {
				item.mistake("the list has an empty entry")
				continue
			}
			vs = append(vs, item)
		}
		return vs
	}
	v.mistake("must be a list, or a single value")
	return nil
}

// text returns a single value as it is written, or false after reporting that
// it is not one.
func (v value) text() (string, bool) {
	node := resolve(v.node)
	if node.Kind != yaml.ScalarNode {
		v.mistake("must be a single value")
		return "", false
	}
	return node.Value, true
}

// is says whether v is a single value that reads so.
func (v value) is(word string) bool {
	node := resolve(v.node)
	return node.Kind == yaml.ScalarNode && node.Value == word
}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$`)

func validName(s string) bool { return namePattern.MatchString(s) }

var envPattern = regexp.MustCompile(`^[A-Za-z0-9_*?]{1,64}$`)

// takeover is variables with which a client runs what it likes in place of a
// forced command. The list is not complete, and need not be: it is there to
// catch patterns that are too wide.
var takeover = []string{"LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "BASH_ENV", "ENV", "PATH", "SHELL", "HOME"}

func (v value) envPatterns() []string {
	if n := resolve(v.node); n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		return nil // nothing is accepted
	}
	var patterns []string
	for _, v := range v.list() {
		s, ok := v.text()
		if !ok {
			continue
		}
		if !envPattern.MatchString(s) {
			v.mistake("%q is not a pattern for names of variables; write it like LC_*", s)
			continue
		}
		// path.Match knows more than * and ?, but nothing that can be in here.
		i := slices.IndexFunc(takeover, func(name string) bool { ok, _ := path.Match(s, name); return ok })
		if i >= 0 {
			v.mistake("%q lets clients set %s, and with it get around command= in authorized keys", s, takeover[i])
			continue
		}
		patterns = append(patterns, s)
	}
	return patterns
}

var accountPattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9._-]{0,31}$`)

func (v value) account() string {
	s, ok := v.text()
	if ok && !accountPattern.MatchString(s) {
		v.mistake("%q is not the name of an account", s)
	}
	return s
}

// path returns an absolute path.
func (v value) path() string {
	s, ok := v.text()
	switch {
	case !ok:
		return ""
	case s == "":
		v.mistake("the path is empty")
		return ""
	case strings.ContainsRune(s, 0):
		v.mistake("the path contains a NUL byte")
		return ""
	case s == "~" || strings.HasPrefix(s, "~/"):
		v.mistake("%q: ~ is not expanded here; write the path out", s)
		return ""
	}
	return join(v.dir, s)
}

func (v value) folder() string {
	p := v.path()
	if p == "" {
		return ""
	}
	switch info, err := os.Stat(p); {
	case err != nil:
		v.mistake("%s: %v", p, reason(err))
	case !info.IsDir():
		v.mistake("%s is not a folder", p)
	}
	return p
}
