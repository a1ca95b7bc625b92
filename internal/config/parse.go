package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// parse reads the text of a file. file is its name in the mistakes, dir the base of
// relative paths, or empty if these are mistakes. aws may be nil, and running is nil
// or the settings that the file replaces.
func parse(data []byte, file, dir string, aws *AWS, running *Gateway) (*Gateway, error) {
	r := &report{file: file}
	root, err := document(data)
	if err != nil {
		r.syntax(err)
		return nil, r.err()
	}
	g := Defaults()
	v := value{node: root, dir: dir, aws: aws, copies: &copies{}, report: r}
	v.copies.dir = v.copiesDir()
	var roles *value
	var certificates []value

	seen := v.mapping(map[string]func(value){
		"listen":              func(v value) { g.Listen = v.addresses() },
		"host_keys":           func(v value) { g.HostKeys = v.privateKeys(maxHostKeys) },
		"host_certificates":   func(v value) { certificates = v.list() }, // read after host_keys
		"fleet_key":           func(v value) { g.FleetKeys = v.privateKeys(maxFleetKeys) },
		"authorized_keys_dir": func(v value) { g.AuthorizedKeysDir = v.folderOrCopy(false) },
		"self_service_keys":   func(v value) { g.SelfServiceKeys = v.boolean() },
		"totp_dir":            func(v value) { g.TOTPDir = v.folderOrCopy(true) },
		"totp":                func(v value) { g.TOTPRequired = v.oneOf("optional", "required") },
		"state_dir":           func(v value) { g.StateDir = v.path() },

		"trusted_user_ca_keys":         func(v value) { g.TrustedUserCAKeys = v.files() },
		"authorized_principals_dir":    func(v value) { g.AuthorizedPrincipalsDir = v.folderOrCopy(false) },
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

		"ledger":     func(v value) { v.ledger(&g.Ledger) },
		"advertise":  func(v value) { g.Advertise = v.reachableAddress() },
		"monitoring": func(v value) { v.monitoring(&g.Monitoring) },
		"tracing":    func(v value) { v.tracing(&g.Tracing) },
		"api":        func(v value) { v.api(&g.API) },

		"login_grace_time":         func(v value) { g.LoginGraceTime = v.duration(time.Second) },
		"max_startups":             func(v value) { g.MaxStartups = v.maxStartups() },
		"per_source_max_startups":  func(v value) { g.PerSourceMaxStartups = v.integerOrNone() },
		"starts_per_user":          func(v value) { g.StartsPerUser = v.startRate() },
		"log_per_user":             func(v value) { g.LogPerUser = v.logLimit() },
		"max_auth_tries":           func(v value) { g.MaxAuthTries = v.integer(1, 100) },
		"max_sessions":             func(v value) { g.MaxSessions = v.integer(1, 10_000) },
		"max_channels":             func(v value) { g.MaxChannels = v.integer(1, 100_000) },
		"max_connections_per_user": func(v value) { g.MaxConnectionsPerUser = v.integer(1, 1_000_000) },
		"client_alive_interval":    func(v value) { g.ClientAliveInterval = v.durationOrZero(time.Second) },
		"client_alive_count_max":   func(v value) { g.ClientAliveCountMax = v.integer(1, 1000) },
		"tcp_keep_alive":           func(v value) { g.DisableTCPKeepAlive = !v.boolean() },
		"drain":                    func(v value) { g.Drain = v.duration(0) },
		"drain_delay":              func(v value) { g.DrainDelay = v.duration(0) },
		"task_protection":          func(v value) { g.TaskProtection = v.taskProtection() },
		"ciphers":                  func(v value) { g.Ciphers = v.algorithms("cipher", ciphers, defaultCiphers) },
		"macs":                     func(v value) { g.MACs = v.algorithms("MAC", macs, macs) },
		"kex_algorithms":           func(v value) { g.KexAlgorithms = v.algorithms("key exchange", kexes, defaultKexes) },
		"rekey_limit":              func(v value) { g.RekeyBytes, g.RekeyInterval = v.rekeyLimit() },
		"version_addendum":         func(v value) { g.VersionAddendum = v.versionAddendum() },
		"banner":                   func(v value) { g.Banner = v.banner() },
		"profiles":                 func(v value) { v.profiles(g.Profiles) },
		"audit":                    func(v value) { v.audit(&g.Audit) },
		"recordings":               func(v value) { v.recordings(&g.Recordings) },
		"roles":                    func(v value) { roles = &v }, // read after profiles
	})
	if roles != nil {
		g.Roles = roles.roles(g.Profiles)
	}

	v.checkLedger(g)
	v.checkListeners(g)
	for _, required := range []struct{ key, hint string }{
		{"authorized_keys_dir", "name the folder with one authorized_keys file per user"},
		{"fleet_key", `name a private key that only gateways have; make one with ssh-keygen -t ed25519 -N "" -f FILE`},
		{"host_keys", `name at least one private key; make one with ssh-keygen -t ed25519 -N "" -f FILE`},
	} {
		if !seen[required.key] {
			r.add(0, "%s is missing; %s", required.key, required.hint)
		}
	}
	for _, fleet := range g.FleetKeys {
		if slices.ContainsFunc(g.HostKeys, func(host ssh.Signer) bool { return sameKey(host.PublicKey(), fleet.PublicKey()) }) {
			r.add(v.lineOf("fleet_key"), "fleet_key: is also a host key; a key that signs logins to bastions must have no other use")
		}
	}
	for _, v := range certificates {
		if signer := v.hostCertificate(g.HostKeys); signer != nil {
			g.HostCertificates = append(g.HostCertificates, signer)
		}
	}
	if g.Audit.To == "none" {
		const why = "record: transfers is written to the audit log, and audit.to is none"
		for _, role := range g.Roles {
			if role.Record.Includes(identity.RecordTransfers) {
				r.add(role.Line, "roles.%s: %s", role.Name, why)
			}
		}
		for name, p := range g.Profiles {
			if p.Record.Includes(identity.RecordTransfers) {
				r.add(v.lineOf("profiles"), "profiles.%s: %s", name, why)
			}
		}
	}
	v.checkAuth(&g.Auth)
	if running != nil {
		v.checkFixed(g, running)
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	g.Copies = v.copies.all
	return g, nil
}

// profiles reads the value of the key profiles into profiles.
func (v value) profiles(profiles map[string]Profile) {
	v.entries(func(name string, v value) {
		switch {
		case !validName(name):
			v.mistake("%q is not a name for a profile; write 1 to 32 letters, digits, - and _, a letter or digit first", name)
		case name == "ctl":
			v.mistake("the name ctl is reserved for the console")
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
			"gateway_ports": func(v value) {
				p.Forwarding.GatewayPorts = v.matching(gatewayPortsPattern, "a value of GatewayPorts; there are no, yes and clientspecified")
			},
			"stream_local_bind_unlink": func(v value) { p.Forwarding.StreamLocalBindUnlink = v.boolean() },
			"stream_local_bind_mask": func(v value) {
				p.Forwarding.StreamLocalBindMask = v.matching(umaskPattern, "a umask; write three octal digits, as in 0177")
			},
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
			v.mistake("the launcher fargate needs the key fargate with at least cluster, task_definition and subnets")
		}
		if p.Launcher == "local" && seen["fargate"] {
			v.mistake("the key fargate has no effect without launcher: fargate")
		}
		if p.Idle > 0 && p.MaxLife > 0 && p.MaxLife < p.Idle {
			v.mistake("max_life (%v) is shorter than idle (%v)", p.MaxLife, p.Idle)
		}
		profiles[name] = p
	})
}

// document returns the root of the only document in data, or nil if it is empty.
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
	line int // 0: the whole file
	text string
}

func (r *report) add(line int, format string, args ...any) {
	r.mistakes = append(r.mistakes, mistake{line, fmt.Sprintf(format, args...)})
}

// syntaxHints are remedies for messages of package yaml that name no cause.
var syntaxHints = map[string]string{
	"found character that cannot start any token":    "indent with spaces and not with tabs, and quote values that begin with %, @ or `",
	"could not find expected ':'":                    "the line before may lack its colon, or the space behind it",
	"mapping values are not allowed in this context": "the line before may lack its colon, and a value with a colon and a space needs quotes",
}

// syntax adds an error of package yaml.
func (r *report) syntax(err error) {
	if load := (*yaml.LoadError)(nil); errors.As(err, &load) {
		if load.Mark.Line > 0 {
			text := load.Message
			if hint := syntaxHints[text]; hint != "" {
				text += "; " + hint
			}
			r.add(load.Mark.Line, "not valid YAML: %s", text)
			return
		}
		err = errors.New(load.Message)
	}
	r.add(0, "not valid YAML: %v", err)
}

// err returns all mistakes ordered by line, those of the whole file last; nil if
// there are none.
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
	var errs Mistakes
	for _, m := range r.mistakes {
		at := r.file
		if m.line > 0 {
			at = fmt.Sprintf("%s:%d", r.file, m.line)
		}
		errs = append(errs, fmt.Errorf("%s: %s", at, m.text))
	}
	if errs == nil {
		return nil
	}
	return errs
}

// Mistakes are the mistakes in a file, in the order of their lines. Each begins with
// its place.
type Mistakes []error

// Error returns the mistakes, one per line.
func (m Mistakes) Error() string { return errors.Join(m...).Error() }

var (
	gatewayPortsPattern = regexp.MustCompile(`^(?:no|yes|clientspecified)$`)
	umaskPattern        = regexp.MustCompile(`^0?[0-7]{3}$`)
)

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$`)

func validName(s string) bool { return namePattern.MatchString(s) }

var envPattern = regexp.MustCompile(`^[A-Za-z0-9_*?]{1,64}$`)

// takeover are variables with which a client can bypass a forced command. The list
// is not complete: it detects patterns that are too wide.
var takeover = []string{"LD_PRELOAD", "LD_AUDIT", "LD_LIBRARY_PATH", "BASH_ENV", "ENV", "PATH", "SHELL", "HOME"}

func (v value) envPatterns() []string {
	if n := resolve(v.node); n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		return nil // no variable is accepted
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
		// envPattern excludes the other special characters of path.Match.
		i := slices.IndexFunc(takeover, func(name string) bool { ok, _ := path.Match(s, name); return ok })
		if i >= 0 {
			v.mistake("%q permits clients to set %s, which bypasses command= in authorized keys", s, takeover[i])
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
	case v.dir == "" && !filepath.IsAbs(s):
		v.mistake("%q is relative to the folder of the configuration, which is not a file; write an absolute path", s)
		return ""
	}
	return join(v.dir, s)
}

// folderOrCopy reads the path of a folder, or the reference of one.
func (v value) folderOrCopy(private bool) string {
	if p, ok := v.copyOf(true, private); ok {
		return p
	}
	return v.folder()
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
