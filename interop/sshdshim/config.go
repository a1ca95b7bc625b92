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

// ciphers are all the gateway knows. By itself it does not offer AES-CTR to an
// OpenSSH client; the suite's loops are to reach it.
var ciphers = []string{ssh.CipherAES128GCM, ssh.CipherAES256GCM, ssh.CipherAES256CTR, ssh.CipherAES192CTR, ssh.CipherAES128CTR}

// kexes and macs are what the gateway offers; see package gateway.
var (
	kexes = []string{
		ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519,
		ssh.KeyExchangeDH16SHA512, ssh.KeyExchangeDH14SHA256,
	}
	macs = []string{ssh.HMACSHA256ETM, ssh.HMACSHA512ETM, ssh.HMACSHA256, ssh.HMACSHA512}
)

// offered says whether the gateway has an algorithm. Kinds it does not choose
// from are left as they are.
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

// settings are an sshd_config as it applies to the user of the suite. Names are
// in lower case.
type settings map[string][]string

// repeatable options gather values; of any other the first counts.
var repeatable = []string{"hostkey", "acceptenv", "listenaddress", "port"}

// parseSettings reads what sshd -f file -o options would. Match blocks override
// what stands before them, and count only if they are for all or for userName.
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

// ignored options say nothing that could be done or left undone here.
var ignored = map[string]string{
	"addressfamily":          "ListenAddress says it all",
	"loglevel":               "the gateway's log has one level",
	"strictmodes":            "the suite's folder passes it",
	"usepam":                 "bastions have no PAM",
	"useprivilegeseparation": "obsolete in sshd too",
	"protocol":               "obsolete in sshd too",
	"securitykeyprovider":    "the client's",
	"permituserenvironment":  "authorized_keys belong to the operator: always yes",
	"hostkeyalgorithms":      "narrows by the host keys, see hostKeys",
}

// A site is what a configuration is translated to.
type site struct {
	yaml    []byte // the gateway's
	pidFile string
}

// translate makes the gateway's configuration, and the folder of authorized
// keys it names, of an sshd_config. It writes into dir, which must be this
// call's own.
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

	var y bytes.Buffer
	put := func(key string, values ...string) {
		quoted := make([]string, len(values))
		for i, v := range values {
			quoted[i] = strconv.Quote(v)
		}
		if list := strings.Join(quoted, ", "); len(values) == 1 {
			fmt.Fprintf(&y, "%s: %s\n", key, list)
		} else {
			fmt.Fprintf(&y, "%s: [%s]\n", key, list)
		}
	}
	// Names that both have, in the words of both.
	same := map[string]string{
		"maxauthtries": "max_auth_tries", "maxsessions": "max_sessions", "maxstartups": "max_startups",
		"clientalivecountmax": "client_alive_count_max", "versionaddendum": "version_addendum",
	}
	durations := map[string]string{"logingracetime": "login_grace_time", "clientaliveinterval": "client_alive_interval"}
	lists := map[string]string{"macs": "macs", "kexalgorithms": "kex_algorithms", "ciphers": "ciphers"}

	put("state_dir", filepath.Join(home, "state"))
	put("fleet_key", filepath.Join(home, "fleet_key"))
	put("drain", "0s")
	put("per_source_penalties", "none") // the suite's own sshd_config says so
	if len(s["ciphers"]) == 0 {
		s["ciphers"] = []string{strings.Join(ciphers, ",")}
	}
	result := site{}
	var keyFile, port string
	var addresses, acceptEnv []string
	var force forced
	for _, name := range slices.Sorted(maps.Keys(s)) {
		values := s[name]
		value := values[0]
		switch name {
		case "hostkey":
			keys, err := hostKeys(values, s["hostkeyalgorithms"])
			if err != nil {
				return site{}, err
			}
			fmt.Fprintf(&y, "host_keys: [%s]\n", strings.Join(keys, ", "))
		case "pidfile":
			result.pidFile = value
		case "trustedusercakeys":
			put("trusted_user_ca_keys", value)
		case "authorizedprincipalsfile":
			// A file in the suite's words, a folder in the gateway's.
			folder := filepath.Join(dir, "principals")
			if err := os.Mkdir(folder, 0o700); err != nil {
				return site{}, err
			}
			data, err := os.ReadFile(strings.ReplaceAll(value, "%u", me.Username))
			if err == nil {
				err = os.WriteFile(filepath.Join(folder, me.Username), data, 0o600)
			}
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return site{}, err
			}
			put("authorized_principals_dir", folder)
		case "authorizedkeyscommand":
			put("authorized_keys_command", value)
		case "authorizedkeyscommanduser":
			put("authorized_keys_command_user", value)
		case "revokedkeys":
			put("revoked_keys", value)
		case "authorizedkeysfile":
			keyFile = strings.ReplaceAll(value, "%u", me.Username)
		case "port":
			port = value
		case "listenaddress":
			addresses = values
		case "acceptenv":
			acceptEnv = strings.Fields(strings.Join(values, " "))
		case "banner":
			// A banner that is not there is none, for sshd.
			if info, err := os.Stat(value); err == nil && info.Size() > 0 {
				put("banner", value)
			}
		case "subsystem":
			if value = strings.Join(strings.Fields(value), " "); value != "sftp "+filepath.Join(home, "bin", "sftp-server") {
				return site{}, unknown(name, value)
			}
		case "forcecommand":
			// sshd's built-in server is the separate one here.
			if rest, ok := strings.CutPrefix(value, "internal-sftp"); ok {
				value = "/usr/lib/openssh/sftp-server" + rest
			}
			force.command = value
		case "allowtcpforwarding":
			force.tcpForwarding = value
		case "permitopen":
			force.permitOpen = strings.Fields(value)
		case "permitlisten":
			force.permitListen = strings.Fields(value)
		case "setenv":
			force.environment = strings.Fields(value)
		case "pubkeyacceptedalgorithms", "pubkeyacceptedkeytypes":
			if !strings.HasPrefix(value, "+") {
				force.keyTypes = strings.Split(value, ",")
			}
		default:
			switch {
			case same[name] != "":
				put(same[name], value)
			case durations[name] != "":
				if _, err := strconv.Atoi(value); err == nil {
					value += "s"
				}
				put(durations[name], value)
			case lists[name] != "":
				fmt.Fprintf(&y, "%s: [%s]\n", lists[name], strings.ReplaceAll(value, ",", ", "))
			case ignored[name] == "":
				return site{}, unknown(name, value)
			}
		}
	}
	for i, a := range addresses {
		addresses[i] = a + ":" + port
	}
	put("listen", addresses...)
	keysDir, err := keyFolder(keyFile, me.Username, force, dir, !c.inetd)
	if err != nil {
		return site{}, err
	}
	put("authorized_keys_dir", keysDir)
	fmt.Fprintf(&y, "profiles:\n  default:\n    idle: 20s\n    local:\n      account: %q\n      agent: %q\n", me.Username, filepath.Join(home, "bin", "bastion-agent"))
	if len(acceptEnv) > 0 {
		fmt.Fprintf(&y, "      accept_env: [\"%s\"]\n", strings.Join(acceptEnv, `", "`))
	}
	result.yaml = y.Bytes()
	return result, nil
}

func unknown(name, value string) error {
	return fmt.Errorf("%s %s: the gateway has nothing like it", name, value)
}

// hostKeys returns the host keys that the gateway can use, of those types that
// HostKeyAlgorithms allows. FIDO keys are made by the suite for hosts as well,
// but a token is not a host's.
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

// forced are settings for all users that only a key can have here.
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
// userName. If they are to be live, so that the suite can change them under a
// running gateway, and there is nothing to add to them, it is the file's own
// folder; otherwise it is in dir.
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

	if o.command != "" { // sshd_config's goes before the key's
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
	// One direction only is said by permitting nothing but a port that nobody
	// uses in the other one.
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

// matchList says whether keys of a type are among the algorithms. All RSA keys
// are good for are signatures with SHA-2.
func matchList(patterns []string, name string) bool {
	if name == ssh.KeyAlgoRSA && matchList(patterns, ssh.KeyAlgoRSASHA256) {
		return true
	}
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, name)
		return ok && err == nil
	})
}
