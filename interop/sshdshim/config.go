package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
)

// ciphers are all that the gateway implements. By default it does not offer AES-CTR to
// an OpenSSH client; the suite tests it.
var ciphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}

// kexes and macs are those that can be configured; see package config.
var (
	kexes = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		ssh.KeyExchangeECDHP256, ssh.KeyExchangeECDHP384, ssh.KeyExchangeECDHP521, ssh.KeyExchangeDH14SHA256,
	}
	macs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
)

// offered reports whether the gateway has an algorithm of a kind, as named by ssh -Q. It
// has all of those kinds that the gateway does not choose from.
func offered(kind, name string) bool {
	switch kind {
	case "cipher", "Ciphers":
		return slices.Contains(ciphers, name)
	case "cipher-auth":
		return slices.Contains(ciphers, name) && strings.Contains(name, "-gcm@")
	case "mac", "MACs":
		return slices.Contains(macs, name)
	case "kex", "KexAlgorithms":
		return slices.Contains(kexes, name)
	case "key", "key-plain":
		return !strings.HasPrefix(name, "ssh-dss")
	}
	return true
}

// settings are the values of an sshd_config for the user of the suite, by names in
// lower case.
type settings map[string][]string

// repeatable options have all their values; others have the first.
var repeatable = []string{"hostkey", "hostcertificate", "acceptenv", "listenaddress", "port"}

// parseSettings reads settings as sshd -f file -o options does. Match blocks override
// settings before them, and apply if they are for all or for userName.
func parseSettings(data []byte, options []string, userName string) (settings, error) {
	global, matched := settings{}, settings{}
	into := global
	add := func(line string) error {
		name, value := splitSetting(line)
		switch {
		case name == "":
		case name == "match":
			applies, err := matches(value, userName)
			if err != nil {
				return err
			}
			into = matched
			if !applies {
				into = settings{}
			}
		case len(into[name]) == 0 || slices.Contains(repeatable, name):
			into[name] = append(into[name], value)
		}
		return nil
	}
	for _, line := range options {
		if err := add(line); err != nil {
			return nil, err
		}
	}
	for line := range strings.Lines(string(data)) {
		if err := add(line); err != nil {
			return nil, err
		}
	}
	for name, values := range matched {
		global[name] = values
	}
	return global, nil
}

func splitSetting(line string) (name, value string) {
	line = strings.TrimSpace(line)
	if line == "" || line[0] == '#' {
		return "", ""
	}
	end := strings.IndexAny(line, " \t=")
	if end < 0 {
		return strings.ToLower(line), ""
	}
	value = strings.TrimLeft(line[end:], " \t")
	value = strings.TrimSpace(strings.TrimPrefix(value, "="))
	return strings.ToLower(line[:end]), strings.Trim(value, `"`)
}

func matches(criteria, userName string) (bool, error) {
	fields := strings.Fields(strings.ToLower(criteria))
	switch {
	case len(fields) == 1 && fields[0] == "all":
		return true, nil
	case len(fields) == 2 && fields[0] == "user":
		return fields[1] == strings.ToLower(userName), nil
	}
	return false, fmt.Errorf("block Match %s: the gateway has nothing like it", criteria)
}

// A translation makes the gateway's configuration of an sshd_config.
type translation struct {
	dir      string // for the files that it writes
	account  string // of the suite
	settings settings
	yaml     bytes.Buffer

	// Set by options, and used when all have been read.
	pidFile, keyFile, port string
	addresses, acceptEnv   []string
	force                  forced
}

// translators translate the options of sshd_config, in lower case. For any other
// option translate returns an error.
var translators = map[string]func(t *translation, values []string) error{
	// Options that the gateway has under the same name.
	"maxauthtries":              copyTo("max_auth_tries"),
	"maxsessions":               copyTo("max_sessions"),
	"maxstartups":               copyTo("max_startups"),
	"clientalivecountmax":       copyTo("client_alive_count_max"),
	"versionaddendum":           copyTo("version_addendum"),
	"tcpkeepalive":              copyTo("tcp_keep_alive"),
	"authorizedkeyscommand":     copyTo("authorized_keys_command"),
	"authorizedkeyscommanduser": copyTo("authorized_keys_command_user"),
	"revokedkeys":               copyTo("revoked_keys"),
	"logingracetime":            copyDurationTo("login_grace_time"),
	"clientaliveinterval":       copyDurationTo("client_alive_interval"),
	"ciphers":                   copyListTo("ciphers"),
	"macs":                      copyListTo("macs"),
	"kexalgorithms":             copyListTo("kex_algorithms"),
	"rekeylimit": store(func(t *translation, value string) { // sshd's units of time may be capitals, too
		bytes, interval, _ := strings.Cut(value, " ")
		t.put("rekey_limit", strings.TrimSpace(bytes+" "+strings.ToLower(interval)))
	}),
	"hostcertificate": func(t *translation, values []string) error {
		t.put("host_certificates", values...)
		return nil
	},

	// Options in another form.
	"hostkey":                  (*translation).hostKeys,
	"trustedusercakeys":        (*translation).userCAs,
	"authorizedprincipalsfile": (*translation).principals,
	"banner":                   (*translation).banner,
	"authenticationmethods":    only("authenticationmethods", "publickey"), // the only method without it
	"subsystem": func(t *translation, values []string) error {
		value := strings.Join(strings.Fields(values[0]), " ")
		return only("subsystem", "sftp "+filepath.Join(home, "bin", "sftp-server"))(t, []string{value})
	},

	"pidfile":       store(func(t *translation, value string) { t.pidFile = value }),
	"port":          store(func(t *translation, value string) { t.port = value }),
	"listenaddress": func(t *translation, values []string) error { t.addresses = values; return nil },
	"acceptenv": func(t *translation, values []string) error {
		t.acceptEnv = strings.Fields(strings.Join(values, " "))
		return nil
	},
	"authorizedkeysfile": store(func(t *translation, value string) { t.keyFile = strings.ReplaceAll(value, "%u", t.account) }),

	// Options that only a key can have in the gateway.
	"forcecommand": store(func(t *translation, value string) {
		// The server that is built into sshd is a program here.
		if rest, ok := strings.CutPrefix(value, "internal-sftp"); ok {
			value = "/usr/lib/openssh/sftp-server" + rest
		}
		t.force.command = value
	}),
	"allowtcpforwarding":       store(func(t *translation, value string) { t.force.tcpForwarding = value }),
	"permitopen":               store(func(t *translation, value string) { t.force.permitOpen = strings.Fields(value) }),
	"permitlisten":             store(func(t *translation, value string) { t.force.permitListen = strings.Fields(value) }),
	"setenv":                   store(func(t *translation, value string) { t.force.environment = strings.Fields(value) }),
	"pubkeyacceptedalgorithms": store(acceptedTypes),
	"pubkeyacceptedkeytypes":   store(acceptedTypes),

	"addressfamily":          ignore("ListenAddress has the family"),
	"loglevel":               ignore("the gateway's log has one level"),
	"strictmodes":            ignore("the suite's folder passes it"),
	"usepam":                 ignore("bastions have no PAM"),
	"useprivilegeseparation": ignore("obsolete in sshd, too"),
	"protocol":               ignore("obsolete in sshd, too"),
	"securitykeyprovider":    ignore("the client's"),
	"permituserenvironment":  ignore("always yes: the operator writes authorized_keys"),
	"hostkeyalgorithms":      ignore("selects host keys, see hostKeys"),
}

// put writes a setting of the gateway.
func (t *translation) put(key string, values ...string) {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = strconv.Quote(v)
	}
	if list := strings.Join(quoted, ", "); len(values) == 1 {
		fmt.Fprintf(&t.yaml, "%s: %s\n", key, list)
	} else {
		fmt.Fprintf(&t.yaml, "%s: [%s]\n", key, list)
	}
}

func copyTo(key string) func(*translation, []string) error {
	return store(func(t *translation, value string) { t.put(key, value) })
}

// copyDurationTo also accepts sshd's number of seconds.
func copyDurationTo(key string) func(*translation, []string) error {
	return store(func(t *translation, value string) {
		if _, err := strconv.Atoi(value); err == nil {
			value += "s"
		}
		t.put(key, value)
	})
}

func copyListTo(key string) func(*translation, []string) error {
	return store(func(t *translation, value string) {
		fmt.Fprintf(&t.yaml, "%s: [%s]\n", key, strings.ReplaceAll(value, ",", ", "))
	})
}

// store is for options of which the first value counts.
func store(set func(t *translation, value string)) func(*translation, []string) error {
	return func(t *translation, values []string) error { set(t, values[0]); return nil }
}

// only accepts a single value, which changes nothing.
func only(name, value string) func(*translation, []string) error {
	return func(_ *translation, values []string) error {
		if values[0] != value {
			return unknown(name, values[0])
		}
		return nil
	}
}

// ignore is for options without an effect here, for the given reason.
func ignore(string) func(*translation, []string) error {
	return func(*translation, []string) error { return nil }
}

func acceptedTypes(t *translation, value string) {
	if !strings.HasPrefix(value, "+") {
		t.force.keyTypes = strings.Split(value, ",")
	}
}

func (t *translation) hostKeys(values []string) error {
	keys, err := hostKeys(values, t.settings["hostkeyalgorithms"])
	if err == nil {
		fmt.Fprintf(&t.yaml, "host_keys: [%s]\n", strings.Join(keys, ", "))
	}
	return err
}

// acceptsCertificates reports whether the server accepts certificates. If not, it
// has no certificate authorities.
func (t *translation) acceptsCertificates() bool {
	accepted := t.settings["pubkeyacceptedalgorithms"]
	return len(accepted) == 0 || acceptsCertificates(accepted[0])
}

func (t *translation) userCAs(values []string) error {
	if t.acceptsCertificates() {
		t.put("trusted_user_ca_keys", values[0])
	}
	return nil
}

// principals makes a folder of the suite's file.
func (t *translation) principals(values []string) error {
	if !t.acceptsCertificates() {
		return nil
	}
	folder := filepath.Join(t.dir, "principals")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	data, err := os.ReadFile(strings.ReplaceAll(values[0], "%u", t.account))
	if err == nil {
		err = os.WriteFile(filepath.Join(folder, t.account), data, 0o600)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	t.put("authorized_principals_dir", folder)
	return nil
}

// banner leaves out a file that does not exist, as sshd does.
func (t *translation) banner(values []string) error {
	if info, err := os.Stat(values[0]); err == nil && info.Size() > 0 {
		t.put("banner", values[0])
	}
	return nil
}

// A site is the result of a translation.
type site struct {
	yaml    []byte // the gateway's configuration
	pidFile string
}

// translate makes the gateway's configuration, and the folder of authorized keys
// that it names, of an sshd_config. It writes into dir, which must be this call's
// own.
func translate(c call, dir string) (site, error) {
	data, err := os.ReadFile(c.config)
	if err != nil {
		return site{}, err
	}
	me, err := user.Current()
	if err != nil {
		return site{}, err
	}
	s, err := parseSettings(data, c.options, me.Username)
	if err != nil {
		return site{}, fmt.Errorf("%s: %w", c.config, err)
	}
	if len(s["ciphers"]) == 0 {
		s["ciphers"] = []string{strings.Join(ciphers, ",")}
	}
	t := &translation{dir: dir, account: me.Username, settings: s}
	t.put("state_dir", filepath.Join(home, "state"))
	t.put("fleet_key", filepath.Join(home, "fleet_key"))
	t.put("drain", "0s")
	t.put("per_source_penalties", "none") // as in the suite's own sshd_config
	fmt.Fprintf(&t.yaml, "audit: {to: %q}\n", filepath.Join(dir, "audit.log"))
	fmt.Fprint(&t.yaml, "roles: {everybody: {users: \"*\"}}\n")
	for _, name := range slices.Sorted(maps.Keys(s)) {
		translator, ok := translators[name]
		if !ok {
			return site{}, unknown(name, s[name][0])
		}
		if err := translator(t, s[name]); err != nil {
			return site{}, err
		}
	}
	for i, a := range t.addresses {
		t.addresses[i] = a + ":" + t.port
	}
	t.put("listen", t.addresses...)
	keysDir, err := keyFolder(t.keyFile, t.account, t.force, dir, !c.inetd)
	if err != nil {
		return site{}, err
	}
	t.put("authorized_keys_dir", keysDir)
	// record: transfers ends a session of sftp or scp that the gateway cannot follow.
	fmt.Fprintf(&t.yaml, "profiles:\n  default:\n    idle: 20s\n    record: transfers\n    local:\n      account: %q\n      agent: %q\n", t.account, filepath.Join(home, "bin", "bastion-agent"))
	if len(t.acceptEnv) > 0 {
		fmt.Fprintf(&t.yaml, "      accept_env: [\"%s\"]\n", strings.Join(t.acceptEnv, `", "`))
	}
	return site{t.yaml.Bytes(), t.pidFile}, nil
}

func unknown(name, value string) error {
	return fmt.Errorf("%s %s: the gateway has nothing like it", name, value)
}

// hostKeys returns the host keys that the gateway can use, of the types that
// HostKeyAlgorithms permits. It leaves out the FIDO keys that the suite also makes for
// hosts.
func hostKeys(files, algorithms []string) ([]string, error) {
	var usable []string
	for _, file := range files {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		key, err := ssh.ParsePrivateKey(pem)
		if err != nil {
			if public, perr := os.ReadFile(strings.Replace(file, "host.", "", 1) + ".pub"); perr == nil && bytes.HasPrefix(public, []byte("sk-")) {
				continue
			}
			return nil, fmt.Errorf("host key %s: %w", file, err)
		}
		typ := key.PublicKey().Type()
		if len(algorithms) > 0 && !strings.HasPrefix(algorithms[0], "+") && !matchList(strings.Split(algorithms[0], ","), typ) {
			continue
		}
		usable = append(usable, strconv.Quote(file))
	}
	return usable, nil
}

// forced are settings of sshd for all users that only a key can have in the gateway.
type forced struct {
	command                  string
	tcpForwarding            string
	permitOpen, permitListen []string
	environment              []string
	keyTypes                 []string // nil: all
}

func (o forced) empty() bool {
	return o.command == "" && (o.tcpForwarding == "" || o.tcpForwarding == "yes") &&
		o.permitOpen == nil && o.permitListen == nil && o.environment == nil && o.keyTypes == nil
}

// keyFolder returns a folder for authorized_keys_dir, with the keys of file for
// userName. If live is set, so that the suite can change them while the gateway runs,
// and o adds no options, it is the file's own folder; otherwise it is in dir.
func keyFolder(file, userName string, o forced, dir string, live bool) (string, error) {
	if live && o.empty() {
		folder := filepath.Dir(file)
		link := filepath.Join(folder, userName)
		if err := os.Symlink(filepath.Base(file), link); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
		return folder, nil
	}
	folder := filepath.Join(dir, "keys")
	if err := os.Mkdir(folder, 0o700); err != nil {
		return "", err
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return folder, nil
	} else if err != nil {
		return "", err
	}
	var out bytes.Buffer
	for line := range strings.Lines(string(data)) {
		changed, err := o.apply(strings.TrimSpace(line))
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&out, changed)
	}
	return folder, os.WriteFile(filepath.Join(folder, userName), out.Bytes(), 0o600)
}

var (
	keyType      = regexp.MustCompile(`^(ssh-|ecdsa-|sk-)\S+ `)
	command      = regexp.MustCompile(`(?i)command="(\\"|[^"])*"`)
	permitopen   = regexp.MustCompile(`(?i)permitopen="[^"]*"`)
	permitlisten = regexp.MustCompile(`(?i)permitlisten="[^"]*"`)
)

// apply returns a line of authorized_keys with the options added.
func (o forced) apply(line string) (string, error) {
	options, key := splitOptions(line)
	if key == "" || key[0] == '#' {
		return line, nil
	}
	typ, _, _ := strings.Cut(key, " ")
	if o.keyTypes != nil && !matchList(o.keyTypes, typ) {
		return "# not an accepted type: " + typ, nil
	}
	with := func(option string) { options = append(options, option) }
	without := func(re *regexp.Regexp) {
		options = slices.DeleteFunc(options, re.MatchString)
	}
	has := func(re *regexp.Regexp) bool { return slices.ContainsFunc(options, re.MatchString) }

	if o.command != "" { // sshd_config has priority over the key
		without(command)
		with(`command="` + strings.ReplaceAll(o.command, `"`, `\"`) + `"`)
	}
	if o.permitOpen != nil && has(permitopen) || o.permitListen != nil && has(permitlisten) {
		return "", errors.New("PermitOpen or PermitListen both in sshd_config and at a key: the gateway has only the latter")
	}
	for _, to := range o.permitOpen {
		with(`permitopen="` + to + `"`)
	}
	for _, at := range o.permitListen {
		with(`permitlisten="` + at + `"`)
	}
	for _, env := range o.environment {
		with(`environment="` + env + `"`)
	}
	// To permit one direction only, permit an unused port in the other one.
	local, remote := true, true
	switch o.tcpForwarding {
	case "", "yes", "all":
	case "no":
		with("no-port-forwarding")
	case "local":
		remote = false
	case "remote":
		local = false
	default:
		return "", unknown("AllowTcpForwarding", o.tcpForwarding)
	}
	if !local {
		without(permitopen)
		with(`permitopen="127.0.0.1:1"`)
	}
	if !remote {
		without(permitlisten)
		with(`permitlisten="127.0.0.1:1"`)
	}
	if len(options) == 0 {
		return key, nil
	}
	return strings.Join(options, ",") + " " + key, nil
}

// acceptsCertificates reports whether PubkeyAcceptedAlgorithms has certificates.
func acceptsCertificates(value string) bool {
	return strings.HasPrefix(value, "+") || slices.ContainsFunc(strings.Split(value, ","), func(pattern string) bool {
		ok, err := path.Match(pattern, ssh.CertAlgoED25519v01)
		return ok && err == nil
	})
}

// splitOptions splits a line of authorized_keys into options and the rest.
func splitOptions(line string) (options []string, key string) {
	if keyType.MatchString(line) || line == "" || line[0] == '#' {
		return nil, line
	}
	start, quoted := 0, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line) && line[i+1] == '"':
			i++
		case c == '"':
			quoted = !quoted
		case c == ',' && !quoted:
			options = append(options, line[start:i])
			start = i + 1
		case (c == ' ' || c == '\t') && !quoted:
			return append(options, line[start:i]), strings.TrimSpace(line[i:])
		}
	}
	return nil, line
}

// matchList reports whether keys of a type are among the algorithms. RSA keys sign with
// SHA-2 only.
func matchList(patterns []string, name string) bool {
	if name == ssh.KeyAlgoRSA && matchList(patterns, ssh.KeyAlgoRSASHA256) {
		return true
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return ok && err == nil
	})
}
