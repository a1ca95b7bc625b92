package auth

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"math/big"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

// plain is an Ed25519 key whose text is always the same.
var plain = authorized(edKey(1))

func edKey(seed byte) ssh.PublicKey {
	s := make([]byte, ed25519.SeedSize)
	s[0] = seed
	key, err := ssh.NewPublicKey(ed25519.NewKeyFromSeed(s).Public())
	if err != nil {
		panic(err)
	}
	return key
}

// authorized is the key as ssh-keygen writes it, without a newline.
func authorized(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// wire is a public key made of parts, which need not be a valid one.
func wire(typ string, parts ...any) string {
	b := ssh.Marshal(struct{ T string }{typ})
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			b = append(b, ssh.Marshal(struct{ S string }{p})...)
		case *big.Int:
			b = append(b, ssh.Marshal(struct{ N *big.Int }{p})...)
		}
	}
	return typ + " " + base64.StdEncoding.EncodeToString(b)
}

// rsaOf is an RSA public key of so many bits, without a private key.
func rsaOf(bits int) string {
	n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
	n.Add(n, big.NewInt(1))
	return wire("ssh-rsa", big.NewInt(65537), n)
}

func without(f func(*identity.Permissions)) identity.Permissions {
	p := identity.AllowAll()
	f(&p)
	return p
}

func TestParseOptions(t *testing.T) {
	t.Parallel()
	all := identity.AllowAll()
	none := identity.Permissions{}
	day := func(y int, m time.Month, d, h, mi, s int) time.Time { return time.Date(y, m, d, h, mi, s, 0, time.UTC) }
	tests := []struct {
		in      string
		want    options
		wantErr string // part of it
	}{
		// Flags, and the order they stand in.
		{in: `restrict`, want: options{permissions: none}},
		{in: `ReStRiCt`, want: options{permissions: none}},
		{in: `pty`, want: options{permissions: all}},
		{in: `no-pty`, want: options{permissions: without(func(p *identity.Permissions) { p.PTY = false })}},
		{in: `NO-PTY`, want: options{permissions: without(func(p *identity.Permissions) { p.PTY = false })}},
		{in: `no-port-forwarding`, want: options{permissions: without(func(p *identity.Permissions) { p.PortForwarding = false })}},
		{in: `no-agent-forwarding`, want: options{permissions: without(func(p *identity.Permissions) { p.AgentForwarding = false })}},
		{in: `no-X11-forwarding`, want: options{permissions: without(func(p *identity.Permissions) { p.X11Forwarding = false })}},
		{in: `no-x11-Forwarding`, want: options{permissions: without(func(p *identity.Permissions) { p.X11Forwarding = false })}},
		{in: `no-user-rc`, want: options{permissions: without(func(p *identity.Permissions) { p.UserRC = false })}},
		{in: `restrict,pty`, want: options{permissions: identity.Permissions{PTY: true}}},
		{in: `pty,restrict`, want: options{permissions: none}},
		{in: `no-pty,pty`, want: options{permissions: all}},
		{in: `pty,no-pty,pty,no-pty`, want: options{permissions: without(func(p *identity.Permissions) { p.PTY = false })}},
		{in: `restrict,port-forwarding`, want: options{permissions: identity.Permissions{PortForwarding: true}}},
		{in: `restrict,agent-forwarding`, want: options{permissions: identity.Permissions{AgentForwarding: true}}},
		{in: `restrict,X11-forwarding`, want: options{permissions: identity.Permissions{X11Forwarding: true}}},
		{in: `restrict,user-rc`, want: options{permissions: identity.Permissions{UserRC: true}}},
		{in: `restrict,pty,port-forwarding,agent-forwarding,x11-forwarding,user-rc`, want: options{permissions: all}},
		{in: `no-touch-required`, want: options{permissions: all, noTouch: true}},
		{in: `no-touch-required,touch-required`, want: options{permissions: all}},
		{in: `restrict,no-touch-required`, want: options{noTouch: true}},
		{in: `verify-required`, want: options{permissions: all, verify: true}},
		{in: `restrict,verify-required`, want: options{verify: true}},
		{in: `verify-required,no-verify-required`, want: options{permissions: all}},
		{in: `verify-required="yes"`, wantErr: `takes no value`},

		// Unsupported options are refused.
		{in: `cert-authority`, want: options{permissions: all, authority: true}},
		{in: `principals="a,b c",Cert-Authority`, want: options{permissions: all, authority: true, principals: []string{"a", "b c"}}},
		{in: `cert-authority="x"`, wantErr: `takes no value`},
		{in: `principals="a,b"`, wantErr: `option "principals": restricts nothing without cert-authority`},
		{in: `cert-authority,principals="a",principals="b"`, wantErr: `given more than once`},
		{in: `cert-authority,principals=""`, wantErr: `a principal is empty`},
		{in: `cert-authority,principals="a,,b"`, wantErr: `a principal is empty`},
		{in: `cert-authority,principals=estragon`, wantErr: `must stand in double quotes`},
		{in: `tunnel="0"`, wantErr: `option "tunnel": tunnel devices are not supported`},
		{in: `tunnel="any"`, wantErr: `tunnel devices`},
		{in: `shiny`, wantErr: `option "shiny": unknown`},
		{in: `shiny="yes"`, wantErr: `option "shiny": unknown`},
		{in: `no-restrict`, wantErr: `unknown; the line is refused`},
		{in: `no-command`, wantErr: `unknown; the line is refused`},
		{in: `no-cert-authority`, wantErr: `unknown; the line is refused`},
		{in: `no-no-pty`, wantErr: `unknown; the line is refused`},
		{in: `no-`, wantErr: `unknown; the line is refused`},
		{in: `ptyx`, wantErr: `unknown; the line is refused`},
		{in: `restrict-all`, wantErr: `unknown; the line is refused`},
		{in: `pty,shiny`, wantErr: `option "shiny"`},
		{in: strings.Repeat("x", 300), wantErr: "option of 300 characters: unknown"},

		// Commas, blanks and quotes.
		{in: ``, wantErr: `an option is empty`},
		{in: `,pty`, wantErr: `an option is empty`},
		{in: `pty,`, wantErr: `an option is empty`},
		{in: `pty,,no-pty`, wantErr: `an option is empty`},
		{in: `pty, no-pty`, wantErr: `an option is empty`},
		{in: `="x"`, wantErr: `an option is empty`},
		{in: `"pty"`, wantErr: `an option is empty`},
		{in: `pty"x"`, wantErr: `a comma or a blank must follow`},
		{in: `pty="yes"`, wantErr: `option "pty": takes no value`},
		{in: `restrict="yes"`, wantErr: `option "restrict": takes no value`},
		{in: `command`, wantErr: `option "command": needs a value`},
		{in: `command=`, wantErr: `must stand in double quotes`},
		{in: `command=ls`, wantErr: `must stand in double quotes`},
		{in: `command='ls'`, wantErr: `must stand in double quotes`},
		{in: `command ="ls"`, wantErr: `needs a value`},
		{in: `command= "ls"`, wantErr: `must stand in double quotes`},
		{in: `command="ls`, wantErr: `closing quote is missing`},
		{in: `command="ls\"`, wantErr: `closing quote is missing`},
		{in: `command="`, wantErr: `closing quote is missing`},
		{in: `command="a"b`, wantErr: `a comma or a blank must follow`},
		{in: `command="a""b"`, wantErr: `a comma or a blank must follow`},

		{in: `command="uptime"`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = "uptime" })}},
		{in: `COMMAND="Uptime"`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = "Uptime" })}},
		{in: `command="a b,c=d"`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = "a b,c=d" })}},
		{in: `command="say \"hi\""`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = `say "hi"` })}},
		{in: `command="a\\b\n"`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = `a\\b\n` })}},
		{in: `command="a\\"b"`, want: options{permissions: without(func(p *identity.Permissions) { p.ForceCommand = `a\"b` })}},
		{in: `restrict,command="a",pty`, want: options{permissions: identity.Permissions{PTY: true, ForceCommand: "a"}}},
		{in: `command=""`, wantErr: `an empty command forces nothing`},
		{in: `command="a",command="b"`, wantErr: `option "command": given more than once`},
		{in: `command="a",Command="a"`, wantErr: `given more than once`},

		// expiry-time: the earliest counts, and no zone is local time (here UTC).
		{in: `expiry-time="20300102"`, want: options{permissions: all, expires: day(2030, 1, 2, 0, 0, 0)}},
		{in: `expiry-time="203001020304Z"`, want: options{permissions: all, expires: day(2030, 1, 2, 3, 4, 0)}},
		{in: `expiry-time="20300102030405Z"`, want: options{permissions: all, expires: day(2030, 1, 2, 3, 4, 5)}},
		{in: `expiry-time="20300102030405z"`, want: options{permissions: all, expires: day(2030, 1, 2, 3, 4, 5)}},
		{in: `expiry-time="20300102UTC"`, want: options{permissions: all, expires: day(2030, 1, 2, 0, 0, 0)}},
		{in: `expiry-time="20300102",expiry-time="20290102"`, want: options{permissions: all, expires: day(2029, 1, 2, 0, 0, 0)}},
		{in: `expiry-time="20290102",expiry-time="20300102"`, want: options{permissions: all, expires: day(2029, 1, 2, 0, 0, 0)}},
		{in: `expiry-time=""`, wantErr: `"" is not a time; write YYYYMMDD`},
		{in: `expiry-time="Z"`, wantErr: `not a time`},
		{in: `expiry-time="2030"`, wantErr: `not a time`},
		{in: `expiry-time="2030-01-02"`, wantErr: `not a time`},
		{in: `expiry-time="20300230"`, wantErr: `not a time`},
		{in: `expiry-time="20301301"`, wantErr: `not a time`},
		{in: `expiry-time="203001022500"`, wantErr: `not a time`},
		{in: `expiry-time="2030010203040506"`, wantErr: `not a time`},
		{in: `expiry-time="20300102ZZ"`, wantErr: `not a time`},
		{in: `expiry-time="00010101Z"`, wantErr: `not a time`}, // the zero time would mean never
		{in: `expiry-time="19691231Z"`, wantErr: `not a time`},
		{in: `expiry-time="forever"`, wantErr: `not a time`},

		// environment: the first of a name counts.
		{in: `environment="A=1"`, want: options{permissions: without(func(p *identity.Permissions) { p.Environment = []string{"A=1"} })}},
		{in: `environment="A="`, want: options{permissions: without(func(p *identity.Permissions) { p.Environment = []string{"A="} })}},
		{in: `environment="A_1=b=c d"`, want: options{permissions: without(func(p *identity.Permissions) { p.Environment = []string{"A_1=b=c d"} })}},
		{in: `environment="A=1",environment="A=2",environment="B=3"`, want: options{permissions: without(func(p *identity.Permissions) { p.Environment = []string{"A=1", "B=3"} })}},
		{in: `environment="A"`, wantErr: `must have the form NAME=value`},
		{in: `environment="=1"`, wantErr: `must have the form NAME=value`},
		{in: `environment="A B=1"`, wantErr: `letters, digits and underscores`},
		{in: `environment="A-B=1"`, wantErr: `letters, digits and underscores`},

		// permitopen and permitlisten.
		{in: `permitopen="db:5432"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitOpen = []string{"db:5432"} })}},
		{in: `permitopen="db:*",permitopen="[::1]:022"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitOpen = []string{"db:*", "[::1]:22"} })}},
		{in: `permitopen="[db]:80"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitOpen = []string{"db:80"} })}},
		{in: `permitopen="db"`, wantErr: `"db" is not host:port`},
		{in: `permitopen=""`, wantErr: `not host:port`},
		{in: `permitopen="80"`, wantErr: `not host:port`},
		{in: `permitopen="none"`, wantErr: `not host:port`},
		{in: `permitopen=":80"`, wantErr: `not host:port`},
		{in: `permitopen="::1:80"`, wantErr: `not host:port`},
		{in: `permitopen="db:"`, wantErr: `"" is not a port`},
		{in: `permitopen="db:0"`, wantErr: `"0" is not a port`},
		{in: `permitopen="db:65536"`, wantErr: `not a port`},
		{in: `permitopen="db:-1"`, wantErr: `not a port`},
		{in: `permitopen="db:ssh"`, wantErr: `not a port`},
		{in: `permitopen="a,b:80"`, wantErr: `"a,b" is not a host`},
		{in: `permitopen="a b:80"`, wantErr: `not a host`},
		{in: `permitopen="a/b:80"`, wantErr: `not a host`},
		{in: `permitlisten="8080"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitListen = []string{"8080"} })}},
		{in: `permitlisten="*"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitListen = []string{"*"} })}},
		{in: `permitlisten="localhost:8080",permitlisten="*.example:*"`, want: options{permissions: without(func(p *identity.Permissions) { p.PermitListen = []string{"localhost:8080", "*.example:*"} })}},
		{in: `permitlisten="none"`, wantErr: `not a port`},
		{in: `permitlisten=":80"`, wantErr: `not host:port`},
		{in: `permitlisten=""`, wantErr: `not a port`},

		// from; TestFrom tests matches.
		{in: `from="10.0.0.0/8",from="11.0.0.0/8"`, wantErr: `option "from": given more than once`},
		{in: `from=""`, wantErr: `an address is empty`},
		{in: `from="laptop.example.com"`, wantErr: `names are not looked up here`},
	}
	for _, tt := range tests {
		t.Run(tt.in, func(t *testing.T) {
			got, rest, err := parseOptions(tt.in, time.UTC)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if rest != "" || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("\n got %+v, rest %q\nwant %+v", got, rest, tt.want)
			}
			// The same before a key, separated by blanks.
			again, rest, err := parseOptions(tt.in+" \t ssh-ed25519 AAAA", time.UTC)
			if err != nil || rest != "ssh-ed25519 AAAA" || !reflect.DeepEqual(again, got) {
				t.Errorf("before a key: %+v, rest %q, %v", again, rest, err)
			}
		})
	}
}

func TestParseTimeWithoutZoneIsLocal(t *testing.T) {
	t.Parallel()
	east := time.FixedZone("east", 2*60*60)
	local, err := parseTime("203001020304", east)
	if err != nil {
		t.Fatal(err)
	}
	if want := time.Date(2030, 1, 2, 1, 4, 0, 0, time.UTC); !local.Equal(want) {
		t.Errorf("got %v, want %v", local, want)
	}
	utc, err := parseTime("203001020304Z", east)
	if err != nil {
		t.Fatal(err)
	}
	if want := time.Date(2030, 1, 2, 3, 4, 0, 0, time.UTC); !utc.Equal(want) {
		t.Errorf("with Z: got %v, want %v", utc, want)
	}
}

func TestParseLine(t *testing.T) {
	t.Parallel()
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ecPub, err := ssh.NewPublicKey(&ec.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaPub, err := ssh.NewPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	caPub, caPriv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := ssh.NewSignerFromSigner(caPriv)
	if err != nil {
		t.Fatal(err)
	}
	cert := &ssh.Certificate{Key: edKey(1), CertType: ssh.UserCert, ValidPrincipals: []string{"alice"}, ValidBefore: ssh.CertTimeInfinity}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	sk := wire(ssh.KeyAlgoSKED25519, string(caPub), "ssh:")
	blob := strings.Fields(plain)[1]

	tests := []struct {
		name, line string
		wantErr    string // part of it
		empty      bool
	}{
		{name: "empty", line: "", empty: true},
		{name: "blanks", line: " \t \r", empty: true},
		{name: "comment", line: "# " + plain, empty: true},
		{name: "comment after blanks", line: "  #x", empty: true},
		{name: "ed25519", line: plain},
		{name: "ed25519 with comment", line: plain + " alice@laptop and more"},
		{name: "leading blanks", line: " \t " + plain},
		{name: "several blanks", line: "ssh-ed25519 \t " + blob + "\t\tc"},
		{name: "written on Windows", line: plain + "\r"},
		{name: "not UTF-8", line: `command="` + "\xff" + `" ` + plain + " \xfe"},
		{name: "ecdsa", line: authorized(ecPub)},
		{name: "rsa", line: authorized(rsaPub)},
		{name: "rsa 8192", line: rsaOf(8192)},
		{name: "sk", line: sk},
		{name: "sk without touch", line: "no-touch-required " + sk},
		{name: "options", line: `restrict,command="a \" b" ` + plain + " c"},
		{name: "a key in the comment", line: plain + " " + authorized(ecPub)},

		{name: "rsa 1024", line: rsaOf(1024), wantErr: "RSA keys of 1024 bits are not accepted"},
		{name: "rsa 2047", line: rsaOf(2047), wantErr: "RSA keys of 2047 bits"},
		{name: "rsa 8193", line: rsaOf(8193), wantErr: "RSA keys of 8193 bits"},
		{name: "rsa 30000", line: rsaOf(30000), wantErr: "truncated or corrupt"},
		{name: "dsa", line: wire("ssh-dss", big.NewInt(1), big.NewInt(2), big.NewInt(3), big.NewInt(4)), wantErr: "DSA keys are not accepted"},
		{name: "certificate", line: authorized(cert), wantErr: "a certificate is not accepted as a key"},
		{name: "certificate under the key's name", line: "ssh-ed25519 " + strings.Fields(authorized(cert))[1], wantErr: "the line says ssh-ed25519, but the key in it is of type"},
		{name: "type and key differ", line: "ssh-ed25519 " + strings.Fields(authorized(ecPub))[1], wantErr: "the line says ssh-ed25519"},
		{name: "unknown type", line: "ssh-new " + blob, wantErr: `"ssh-new" is not an accepted type of key`},
		{name: "unknown type after options", line: "restrict new " + blob, wantErr: `"new" is not an accepted type of key`},
		{name: "signature algorithm as type", line: "rsa-sha2-256 " + blob, wantErr: "unknown"},
		{name: "upper-case type", line: "SSH-ED25519 " + blob, wantErr: "unknown"},
		{name: "only a type", line: "ssh-ed25519", wantErr: "nothing after ssh-ed25519"},
		{name: "only options", line: "restrict", wantErr: "no key after the options"},
		{name: "only the blob", line: blob, wantErr: "option"},
		{name: "options twice", line: "restrict no-pty " + plain, wantErr: `"no-pty" is not an accepted type of key`},
		{name: "option, then the blob", line: "restrict " + blob, wantErr: "not an accepted type of key"},
		{name: "blank in the options", line: "restrict, pty " + plain, wantErr: "an option is empty"},
		{name: "open quote swallows the key", line: `command="a ` + plain, wantErr: "closing quote is missing"},
		{name: "not base64", line: "ssh-ed25519 !!!!", wantErr: "truncated or corrupt"},
		{name: "NUL", line: plain + "\x00", wantErr: "contains a NUL byte"},
		{name: "too long", line: plain + " " + strings.Repeat("x", maxLine), wantErr: "longer than 8192 bytes"},
		{name: "private key", line: "-----BEGIN OPENSSH PRIVATE KEY-----", wantErr: "write the public key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e, err := parseLine(tt.line, time.UTC)
			switch {
			case tt.wantErr != "":
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("error %v, want one with %q", err, tt.wantErr)
				}
			case err != nil:
				t.Fatal(err)
			case (e.key == nil) != tt.empty:
				t.Errorf("key %v", e.key)
			}
		})
	}
}

// TestPrivateKey: the errors about a private key in place of a public one, which are logged,
// do not quote it.
func TestPrivateKey(t *testing.T) {
	t.Parallel()
	ed := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, ed25519.SeedSize))
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.PrivateKey{ed, rsaKey} {
		block, err := ssh.MarshalPrivateKey(key, "alice@laptop")
		if err != nil {
			t.Fatal(err)
		}
		dir := keysDir(t, "alice", string(pem.EncodeToMemory(block)))
		problems := errors.Join((&Keys{Dir: dir}).Check()...)
		if problems == nil || !strings.Contains(problems.Error(), "alice:1: a private key; write the public key") {
			t.Fatalf("%v", problems)
		}
		body := base64.StdEncoding.EncodeToString(block.Bytes)
		for i := 0; i+30 <= len(body); i += 10 {
			if strings.Contains(problems.Error(), body[i:i+30]) {
				t.Fatalf("%q of the key is in the errors:\n%v", body[i:i+30], problems)
			}
		}
	}
}

// TestTruncatedLine truncates a line at every byte: the rest is either no key
// or the whole key, and never loses a restriction.
func TestTruncatedLine(t *testing.T) {
	t.Parallel()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaPub, err := ssh.NewPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []ssh.PublicKey{edKey(1), rsaPub} {
		line := `restrict,from="10.0.0.0/8",command="a b" ` + authorized(key) + " comment"
		for n := range line {
			e, err := parseLine(line[:n], time.UTC)
			if err != nil || e.key == nil {
				continue
			}
			if string(e.key.Marshal()) != string(key.Marshal()) || e.from == nil || e.permissions.ForceCommand != "a b" || e.permissions.PTY {
				t.Errorf("%q became %+v", line[:n], e)
			}
		}
	}
}

func FuzzParseLine(f *testing.F) {
	for _, s := range []string{
		"", "#", plain, " \t" + plain + "\r", "restrict " + plain, `restrict,command="a \" b",pty ` + plain + " c",
		`from="!10.0.0.1,10.0.0.0/8,2001:db8::*" ` + plain, "cert-authority " + plain, rsaOf(2048), rsaOf(1024),
		`command="\\"" ` + plain, `command="a ` + plain, "ssh-dss AAAA", `environment="A=b",permitopen="[::1]:*" ` + plain,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		e, err := parseLine(line, time.UTC)
		if err != nil || e.key == nil {
			if e.key != nil {
				t.Fatal("a key beside an error")
			}
			return
		}
		// Package ssh must find the same key in the line
		// behind the same number of options.
		if strings.Contains(line, "\n") {
			return // not a line
		}
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
		if err != nil {
			t.Fatalf("package ssh refuses %q: %v", line, err)
		}
		if string(key.Marshal()) != string(e.key.Marshal()) {
			t.Fatalf("package ssh finds another key in %q", line)
		}
	})
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{
		"restrict", "restrict,pty", `command="a b"`, `command="a\"b",no-pty`, `from="10.0.0.0/8,!10.1.*"`, "pty,", `a="b`,
		`expiry-time="20300101Z",expiry-time="20290101"`, `environment="A=b",environment="A=c"`, `permitlisten="8080"`, "no-touch-required",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, rest, err := parseOptions(s, time.UTC)
		if err != nil {
			return
		}
		used := strings.TrimRight(s[:len(s)-len(rest)], " \t")
		// A restriction after the others removes its permission, and
		// changes nothing else.
		restricted, rest, err := parseOptions(used+",restrict x", time.UTC)
		if err != nil || rest != "x" {
			t.Fatalf("%q is fine, with restrict: %v, rest %q", used, err, rest)
		}
		p := restricted.permissions
		if p.PTY || p.PortForwarding || p.AgentForwarding || p.X11Forwarding || p.UserRC {
			t.Fatalf("%q,restrict permits %+v", used, p)
		}
		p.PTY, p.PortForwarding, p.AgentForwarding = o.permissions.PTY, o.permissions.PortForwarding, o.permissions.AgentForwarding
		p.X11Forwarding, p.UserRC = o.permissions.X11Forwarding, o.permissions.UserRC
		restricted.permissions = p
		if !reflect.DeepEqual(o, restricted) {
			t.Fatalf("%q: restrict changed\n%+v to\n%+v", used, o, restricted)
		}
	})
}
