package policy

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

func destinations(t *testing.T, rules ...string) []Destination {
	t.Helper()
	list := []Destination{}
	for _, rule := range rules {
		d, err := ParseDestination(rule)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, d)
	}
	return list
}

func hours(t *testing.T, s string) Hours {
	t.Helper()
	h, err := ParseHours(s)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

var monday = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func TestDecide(t *testing.T) {
	dev := &Role{
		Name: "dev", Line: 10, Users: []string{"alice", "team-*"}, Principals: []string{"devs"},
		Permit: Permit{Shell: true, Exec: true, PTY: true, PortForwarding: true}, Destinations: destinations(t, "*.internal:5432"),
		Listen: []string{"8080"}, Limits: identity.Limits{Connections: 3, Sessions: 2},
	}
	files := &Role{
		Name: "files", Users: []string{"alice", "carol"}, Profiles: []string{"default"},
		Permit: Permit{SFTP: true, AgentForwarding: true}, Record: identity.RecordInput, Limits: identity.Limits{Connections: 5, Bastions: 1},
	}
	office := &Role{
		Name: "office", Users: []string{"dave"}, From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		Hours: []Hours{hours(t, "mon-fri 07:00-19:00")}, Permit: PermitAll(), Admin: true,
	}
	roles := Roles{dev, files, office}
	login := func(user string, change ...func(*Login)) Login {
		l := Login{User: user, Profile: "default", From: netip.MustParseAddr("10.1.2.3"), Now: monday, Key: identity.AllowAll()}
		for _, f := range change {
			f(&l)
		}
		return l
	}
	for _, tt := range []struct {
		name  string
		login Login
		roles string
		err   error
		text  string
	}{
		{name: "both roles", login: login("alice"), roles: "dev files"},
		{name: "pattern", login: login("team-x"), roles: "dev"},
		{name: "name that is longer", login: login("alice2"), err: ErrNoRole},
		{name: "certificate", login: login("erin", func(l *Login) { l.Principals = []string{"x", "devs"} }), roles: "dev"},
		{name: "no role", login: login("mallory"), err: ErrNoRole},
		{name: "another profile", login: login("alice", func(l *Login) { l.Profile = "big" }), roles: "dev"},
		{name: "no role for the profile", login: login("carol", func(l *Login) { l.Profile = "big" }), err: ErrProfile, text: "files"},
		{name: "the console", login: login("carol", func(l *Login) { l.Profile, l.Console = "ctl", true }), roles: "files"},
		{name: "no profile is one that the role is not for", login: login("carol", func(l *Login) { l.Profile = "" }), err: ErrProfile},
		{name: "from the office", login: login("dave"), roles: "office"},
		{name: "from the office, mapped", login: login("dave", func(l *Login) { l.From = netip.MustParseAddr("::ffff:10.1.2.3") }), roles: "office"},
		{name: "from elsewhere", login: login("dave", func(l *Login) { l.From = netip.MustParseAddr("192.0.2.1") }), err: ErrFrom},
		{name: "from nowhere", login: login("dave", func(l *Login) { l.From = netip.Addr{} }), err: ErrFrom},
		{name: "at night", login: login("dave", func(l *Login) { l.Now = monday.Add(10 * time.Hour) }), err: ErrHours, text: "office"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, got, err := roles.Decide(tt.login)
			if !errors.Is(err, tt.err) || err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v", err)
			}
			if names := strings.Join(p.Roles, " "); names != tt.roles || len(got) != len(p.Roles) {
				t.Errorf("roles %q", names)
			}
			if err != nil && !reflect.DeepEqual(p, identity.Permissions{}) {
				t.Errorf("refused, and permitted %+v", p)
			}
		})
	}

	p, mine, _ := roles.Decide(login("alice"))
	want := identity.Permissions{
		PTY: true, PortForwarding: true, AgentForwarding: true, UserRC: true, Roles: []string{"dev", "files"},
		Destinations: []string{"*.internal:5432"}, Listen: []string{"8080"}, Record: identity.RecordInput,
		Limits: identity.Limits{Connections: 5},
	}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("alice may %+v\nwant %+v", p, want)
	}
	if p, _, _ := roles.Decide(login("carol")); p.PTY || !p.NoShell || !p.NoExec || p.NoSFTP || p.UserRC || p.PortForwarding || !slices.Equal(p.Destinations, []string{"none"}) {
		t.Errorf("carol may %+v", p)
	}
	// A role does not grant a permission that the key lacks.
	p, _, _ = roles.Decide(login("alice", func(l *Login) {
		l.Key = identity.Permissions{ForceCommand: "true", PermitOpen: []string{"a:1"}, NoSFTP: true}
	}))
	if p.PTY || p.PortForwarding || p.AgentForwarding || p.X11Forwarding || p.UserRC || !p.NoSFTP || p.ForceCommand != "true" || len(p.PermitOpen) != 1 {
		t.Errorf("a restricted key may %+v", p)
	}
	if p, _, err := Roles(nil).Decide(login("anybody")); err != nil || !reflect.DeepEqual(p, identity.AllowAll()) {
		t.Errorf("without roles: %+v, %v", p, err)
	}
	if _, _, err := (Roles{}).Decide(login("anybody")); !errors.Is(err, ErrNoRole) {
		t.Errorf("with an empty list of roles: %v", err)
	}

	if err := CheckConditions(mine, login("alice")); err != nil {
		t.Error(err)
	}
	if err := CheckConditions([]*Role{dev, office}, login("dave")); !errors.Is(err, ErrNoRole) {
		t.Errorf("holds without a user: %v", err)
	}
	if err := CheckConditions([]*Role{office}, login("dave", func(l *Login) { l.Now = monday.Add(7 * time.Hour) })); !errors.Is(err, ErrHours) {
		t.Errorf("holds after hours: %v", err)
	}
}

func TestHours(t *testing.T) {
	at := func(s string) time.Time {
		tm, err := time.Parse("2006-01-02 15:04 MST", s)
		if err != nil {
			t.Fatal(err)
		}
		return tm
	}
	for _, tt := range []struct {
		hours, at string
		want      bool
	}{ // 2026-11-23 is a Monday
		{"mon-fri 07:00-19:00", "2026-11-23 07:00 UTC", true},
		{"mon-fri 07:00-19:00", "2026-11-23 06:59 UTC", false},
		{"mon-fri 07:00-19:00", "2026-11-23 19:00 UTC", false},
		{"mon-fri 07:00-19:00", "2026-11-22 12:00 UTC", false},
		{"mon-fri 07:00-19:00 Europe/Berlin", "2026-11-23 06:00 UTC", true},
		{"mon-fri 07:00-19:00 Europe/Berlin", "2026-07-20 05:00 UTC", true}, // summer time
		{"mon-fri 07:00-19:00 Europe/Berlin", "2026-07-20 04:59 UTC", false},
		{"fri-mon 00:00-24:00", "2026-11-22 23:59 UTC", true},
		{"fri-mon 00:00-24:00", "2026-11-24 00:00 UTC", false},
		{"Sat,SUN 10:00-16:00", "2026-11-22 10:00 UTC", true},
		{"fri 22:00-06:00", "2026-11-27 22:00 UTC", true},
		{"fri 22:00-06:00", "2026-11-28 05:59 UTC", true},
		{"fri 22:00-06:00", "2026-11-28 22:00 UTC", false},
		{"fri 22:00-06:00", "2026-11-27 05:00 UTC", false},
		{"daily 22:00-06:00", "2026-11-27 05:00 UTC", true},
		{"daily 08:00-9:30", "2026-11-27 09:29 UTC", true},
	} {
		h, err := ParseHours(tt.hours)
		if err != nil {
			t.Errorf("%v", err)
			continue
		}
		if got := h.Contain(at(tt.at)); got != tt.want {
			t.Errorf("%s at %s: %v", h, tt.at, got)
		}
	}
	for _, bad := range []string{
		"", "mon", "mon 07:00", "mon 07:00-", "mon 7-19", "mon 07:00-07:00", "mon 24:00-07:00", "mon 07:60-08:00", "mon 07:00-24:01",
		"xmas 07:00-19:00", "mon- 07:00-19:00", "mon 07:00-19:00 Mars/Base", "mon 07:00-19:00 Local", "mon 07:00-19:00 UTC x", "mon -1:00-19:00", "mon +7:00-19:00",
	} {
		if h, err := ParseHours(bad); err == nil {
			t.Errorf("%q is read as %+v", bad, h)
		}
	}
}

func TestDestinations(t *testing.T) {
	own := func(a netip.Addr) bool {
		return a == netip.MustParseAddr("10.9.9.9") || a == netip.MustParseAddr("2001:db8:9::9")
	}
	for _, tt := range []struct {
		rules, host, addr string
		port              uint32
		open              bool // without the address
		connect           bool
	}{
		{"db.internal:5432", "db.internal", "10.0.0.5", 5432, true, true},
		{"db.internal:5432", "DB.Internal.", "10.0.0.5", 5432, true, true},
		{"db.internal:5432", "db.internal", "10.0.0.5", 5433, false, false},
		{"db.internal:5432", "xdb.internal", "10.0.0.5", 5432, false, false},
		{"*.internal:*", "a.b.internal", "10.0.0.5", 1, true, true},
		{"*.internal:*", "internal", "10.0.0.5", 1, false, false},
		{"*.internal:*", "10.0.0.5", "10.0.0.5", 1, false, false},
		// A name does not lead to the bastion, nor to its link.
		{"*.internal:*", "me.internal", "127.0.0.1", 22, true, false},
		{"*.internal:*", "me.internal", "::1", 22, true, false},
		{"*.internal:*", "me.internal", "0.0.0.0", 22, true, false},
		{"*.internal:*", "me.internal", "::ffff:127.0.0.1", 22, true, false},
		{"*.internal:*", "credentials.internal", "169.254.170.2", 80, true, false},
		{"*.internal:*", "credentials.internal", "fe80::1%eth0", 80, true, false},
		{"*.internal:*", "credentials.internal", "fd00:ec2::254", 80, true, false},
		{"*:*", "169.254.170.2", "169.254.170.2", 80, false, false},
		{"*:*", "localhost", "127.0.0.1", 80, true, false},
		{"*:*", "192.0.2.1", "192.0.2.1", 80, true, true},
		{"*:443", "example.org", "2001:db8::1", 443, true, true},
		{"127.0.0.0/8:*", "localhost", "127.0.0.1", 80, true, true},
		// A name does not make an address of another one.
		{"10.0.0.0/8:8000-8100", "anything", "10.1.2.3", 8050, true, true},
		{"10.0.0.0/8:8000-8100", "anything", "169.254.170.2", 8050, true, false},
		{"10.0.0.0/8:8000-8100", "10.1.2.3.evil.example", "192.0.2.1", 8050, true, false},
		{"10.0.0.0/8:8000-8100", "anything", "10.1.2.3", 8101, false, false},
		{"10.0.0.0/8:8000-8100", "11.0.0.1", "11.0.0.1", 8050, false, false},
		{"10.0.0.0/8:8000-8100", "::ffff:10.0.0.1", "10.0.0.1", 8050, true, true},
		{"10.0.0.0/8:22", "0x0a000001", "127.0.0.1", 22, true, false}, // in an unusual notation
		{"192.0.2.7:22", "192.0.2.7", "192.0.2.7", 22, true, true},
		{"192.0.2.7:22", "192.0.2.8", "192.0.2.8", 22, false, false},
		{"[2001:db8::/32]:443", "2001:db8::5", "2001:db8::5", 443, true, true},
		{"[2001:db8::/32]:443", "2001:db9::5", "2001:db9::5", 443, false, false},
		// The bastion's own address, here 10.9.9.9 and 2001:db8:9::9, has to be named.
		{"*:*", "me.internal", "10.9.9.9", 22, true, false},
		{"*:*", "10.9.9.9", "10.9.9.9", 22, true, false},
		{"*:*", "::ffff:10.9.9.9", "::ffff:10.9.9.9", 22, true, false},
		{"*:*", "me.internal", "2001:db8:9::9", 22, true, false},
		{"0.0.0.0/0:*", "me.internal", "10.9.9.9", 22, true, false},
		{"10.0.0.0/8:*", "10.9.9.9", "10.9.9.9", 22, true, false},
		{"10.9.9.9:22", "me.internal", "10.9.9.9", 22, true, true},
		{"10.9.9.9:22", "10.9.9.9", "::ffff:10.9.9.9", 22, true, true},
		{"0.0.0.0/0:*", "localhost", "127.0.0.1", 22, true, false},
		{"[::/0]:*", "localhost", "::1", 22, true, false},
		{"[fe80::/10]:*", "fe80::1%eth0", "fe80::1%eth0", 22, true, true},
		// Credentials take a rule for the very address, with roles and without.
		{"0.0.0.0/0:*", "169.254.169.254", "169.254.169.254", 80, false, false},
		{"169.254.0.0/16:*", "169.254.170.2", "169.254.170.2", 80, false, false},
		{"169.254.0.0/16:*", "169.254.1.1", "169.254.1.1", 80, true, true},
		{"169.254.0.0/16:*", "credentials.internal", "169.254.170.23", 80, true, false},
		{"169.254.169.254:80", "169.254.169.254", "169.254.169.254", 80, true, true},
		{"169.254.169.254:80", "metadata.internal", "169.254.169.254", 80, true, true},
		{"169.254.169.254:80", "169.254.169.254", "169.254.169.254", 81, false, false},
		{"169.254.169.254:80", "169.254.170.2", "169.254.170.2", 80, false, false},
		{"[fd00:ec2::254]:80", "fd00:ec2::254", "fd00:ec2::254", 80, true, true},
		{"[fd00:ec2::/64]:80", "fd00:ec2::23", "fd00:ec2::23", 80, false, false},
		{"", "169.254.169.254", "169.254.169.254", 80, false, false},
		{"", "::ffff:169.254.169.254", "::ffff:169.254.169.254", 80, false, false},
		{"", "metadata.internal", "169.254.170.2", 80, true, false},
		{"", "metadata.internal", "fd00:ec2::23", 80, true, false},
		{"", "169.254.1.1", "169.254.1.1", 80, true, true},
		{"", "me.internal", "10.9.9.9", 22, true, true},
		{"none", "x", "10.0.0.1", 1, false, false},
		{"a:1,b:2", "b", "10.0.0.1", 2, true, true},
		{"", "x", "127.0.0.1", 1, true, true},
	} {
		p := identity.Permissions{PortForwarding: true, Roles: []string{"dev"}}
		if tt.rules != "" {
			p.Destinations = strings.Split(tt.rules, ",")
		}
		if err := MayOpen(p, tt.host, tt.port); (err == nil) != tt.open {
			t.Errorf("%s, open %s:%d: %v", tt.rules, tt.host, tt.port, err)
		} else if err != nil && !strings.Contains(err.Error(), "role dev") && !strings.Contains(err.Error(), "no rule names it") {
			t.Errorf("%q does not say who refused", err)
		}
		if err := MayConnect(p, tt.host, netip.MustParseAddr(tt.addr), tt.port, own); (err == nil) != tt.connect {
			t.Errorf("%s, connect to %s:%d at %s: %v", tt.rules, tt.host, tt.port, tt.addr, err)
		}
	}
	for _, bad := range []string{
		"", "none", ":22", "db", "db:", "db:0", "db:65536", "db:2-1", "db:http", "10.0.0.*:22", "10.0.0.0/33:22", "10.0.0.1/8:22", "999.1.1.1:22", "::1:22", "[fe80::1%eth0]:22",
		"a b:22", "a,b:22", "ä.example:22", "[::ffff:10.0.0.0/104]:22", strings.Repeat("a", 300) + ":22",
	} {
		if d, err := ParseDestination(bad); err == nil {
			t.Errorf("%q is read as %s", bad, d)
		}
	}
}

// TestCredentialsByKey: of permitopen and destinations, those that are there must
// name the endpoint.
func TestCredentialsByKey(t *testing.T) {
	for _, tt := range []struct {
		permitOpen, destinations string
		host                     string
		want                     bool
	}{
		{"*:*", "", "169.254.169.254", false},
		{"*:80", "", "169.254.169.254", false},
		{"metadata.internal:80", "", "metadata.internal", false},
		{"169.254.169.254:80", "", "169.254.169.254", true},
		{"169.254.169.254:*", "", "169.254.169.254", true},
		{"169.254.169.254:80", "*:*", "169.254.169.254", false},
		{"169.254.169.254:80", "0.0.0.0/0:*", "169.254.169.254", false},
		{"*:*", "169.254.169.254:80", "169.254.169.254", false},
		{"169.254.169.254:80", "169.254.169.254:80", "169.254.169.254", true},
	} {
		p := identity.Permissions{PortForwarding: true, PermitOpen: []string{tt.permitOpen}}
		if tt.destinations != "" {
			p.Destinations = []string{tt.destinations}
		}
		err := MayConnect(p, tt.host, netip.MustParseAddr("169.254.169.254"), 80, func(netip.Addr) bool { return false })
		if (err == nil) != tt.want {
			t.Errorf("permitopen %s, destinations %q, %s: %v", tt.permitOpen, tt.destinations, tt.host, err)
		}
	}
}

// TestKeyAndRole is about forwards that one of the two permits only.
func TestKeyAndRole(t *testing.T) {
	p := identity.Permissions{PortForwarding: true, Roles: []string{"dev", "ops"}, PermitOpen: []string{"a:1", "b:1"}, Destinations: []string{"b:1", "c:1"}, PermitListen: []string{"8080", "8081"}, Listen: []string{"8081", "8082"}}
	for host, want := range map[string]string{"a": "roles dev, ops", "b": "", "c": "permitopen"} {
		if err := MayOpen(p, host, 1); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", host, err)
		}
	}
	for port, want := range map[uint32]string{8080: "roles dev, ops", 8081: "", 8082: "permitlisten"} {
		if err := MayListen(p, "localhost", port); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%d: %v", port, err)
		}
	}
}

func TestAsk(t *testing.T) {
	type hostPort struct {
		Host string
		Port uint32
	}
	type direct struct {
		Host       string
		Port       uint32
		Origin     string
		OriginPort uint32
	}
	word := func(s string) []byte { return ssh.Marshal(struct{ S string }{s}) }
	none := identity.Permissions{NoShell: true, NoExec: true, NoSFTP: true}
	all := identity.AllowAll()
	limited := identity.AllowAll()
	limited.Destinations, limited.Listen = []string{"a:1"}, []string{"1"}
	for _, tt := range []struct {
		channel             bool
		kind                string
		payload             []byte
		none, all, limitedP bool
	}{
		{true, "session", nil, true, true, true},
		{true, "tun@openssh.com", nil, false, false, false},
		{true, "direct-tcpip", ssh.Marshal(direct{"a", 1, "b", 2}), false, true, true},
		{true, "direct-tcpip", ssh.Marshal(direct{"b", 1, "b", 2}), false, true, false},
		{true, "direct-tcpip", []byte{0, 0, 0, 9}, false, true, false},
		{true, "direct-streamlocal@openssh.com", word("/x"), false, true, false},
		{true, "direct-new@example.com", word("/x"), false, true, false},
		{true, "forwarded-tcpip", ssh.Marshal(direct{"b", 1, "b", 2}), false, true, true},
		{true, "x11", nil, false, true, true},
		{true, "auth-agent@openssh.com", nil, false, true, true},
		{true, "new@example.com", nil, true, true, true},
		{false, "tcpip-forward", ssh.Marshal(hostPort{"", 1}), false, true, true},
		{false, "tcpip-forward", ssh.Marshal(hostPort{"", 2}), false, true, false},
		{false, "tcpip-forward", []byte{1}, false, true, false},
		{false, "streamlocal-forward@openssh.com", word("/x"), false, true, false},
		{false, "pty-req", nil, false, true, true},
		{false, "x11-req", nil, false, true, true},
		{false, "auth-agent-req@openssh.com", nil, false, true, true},
		{false, "shell", nil, false, true, true},
		{false, "exec", word("true"), false, true, true},
		{false, "exec", word(""), false, true, true},
		{false, "exec", nil, false, true, true},
		{false, "subsystem", word("sftp"), false, true, true},
		{false, "subsystem", word("other"), false, true, true},
		{false, "env", nil, true, true, true},
		{false, "new@example.com", nil, true, true, true},
	} {
		ask := MayRequest
		if tt.channel {
			ask = MayOpenChannel
		}
		for name, c := range map[string]struct {
			p    identity.Permissions
			want bool
		}{"none": {none, tt.none}, "all": {all, tt.all}, "limited": {limited, tt.limitedP}} {
			if err := ask(c.p, tt.kind, tt.payload); (err == nil) != c.want {
				t.Errorf("%s %q with %s: %v", tt.kind, tt.payload, name, err)
			}
		}
	}
	// One of the three alone.
	if p := (identity.Permissions{NoExec: true}); MayRequest(p, "exec", word("")) != nil || MayRequest(p, "shell", nil) != nil || MayRequest(p, "exec", word("id")) == nil || MayRequest(p, "subsystem", word("netconf")) == nil || MayRequest(p, "subsystem", word("sftp")) != nil {
		t.Error("NoExec")
	}
	if p := (identity.Permissions{NoShell: true}); MayRequest(p, "exec", word("")) == nil || MayRequest(p, "shell", nil) == nil || MayRequest(p, "exec", word("id")) != nil {
		t.Error("NoShell")
	}
}

// TestForced: a forced command is judged by itself, and not by the request in the
// place of which it runs.
func TestForced(t *testing.T) {
	word := func(s string) []byte { return ssh.Marshal(struct{ S string }{s}) }
	all := identity.AllowAll()
	noExec, noSFTP, noShell, pty := all, all, all, all
	noExec.NoExec, noSFTP.NoSFTP, noShell.NoShell, pty.RequirePTY = true, true, true, true
	for _, tt := range []struct {
		forced  string
		p       identity.Permissions
		allowed bool
		noPTY   bool // without a terminal, too
	}{
		{"internal-sftp", all, true, true},
		{"internal-sftp -R", noExec, true, true},
		{" internal-sftp\t-R", noSFTP, false, true},
		{"internal-sftp", noShell, true, true},
		{"internal-sftp", pty, true, true},
		{"internal-sftpd", noExec, false, true},
		{"internal-sftpd", noSFTP, true, true},
		{"serve", all, true, true},
		{"serve", noExec, false, true},
		{"serve", noSFTP, true, true},
		{"serve", noShell, true, true},
		{"serve", pty, true, false},
	} {
		tt.p.ForceCommand = tt.forced
		for _, ask := range []struct {
			kind    string
			payload []byte
		}{{"shell", nil}, {"exec", word("id")}, {"exec", word("")}, {"subsystem", word("sftp")}, {"subsystem", nil}} {
			if err := MayRequest(tt.p, ask.kind, ask.payload); (err == nil) != tt.allowed {
				t.Errorf("%q with %+v, asked for by %s: %v", tt.forced, tt.p, ask.kind, err)
			}
			if err := MayRunWithoutPTY(tt.p, ask.kind, ask.payload); (err == nil) != tt.noPTY {
				t.Errorf("%q with %+v, asked for by %s, without a terminal: %v", tt.forced, tt.p, ask.kind, err)
			}
		}
		if MayRequest(tt.p, "env", nil) != nil {
			t.Error("env")
		}
	}
	if args, ok := ForcedSFTP(identity.Permissions{ForceCommand: "internal-sftp  -u 077\t-R"}); !ok || strings.Join(args, "|") != "-u|077|-R" {
		t.Errorf("%q, %v", args, ok)
	}
}

func TestRequirePTY(t *testing.T) {
	word := func(s string) []byte { return ssh.Marshal(struct{ S string }{s}) }
	for _, tt := range []struct {
		kind     string
		payload  []byte
		required bool // passes with RequirePTY
	}{
		{"shell", nil, false},
		{"exec", word("id"), false},
		{"exec", word(""), false},
		{"exec", nil, false},
		{"subsystem", word("netconf"), false},
		{"subsystem", nil, false},
		{"subsystem", word("sftp"), true}, // MayRequest has the say
		{"pty-req", nil, true},
		{"env", nil, true},
		{"window-change", nil, true},
		{"new@example.com", nil, true},
	} {
		if err := MayRunWithoutPTY(identity.Permissions{RequirePTY: true}, tt.kind, tt.payload); (err == nil) != tt.required {
			t.Errorf("%s %q: %v", tt.kind, tt.payload, err)
		}
		if err := MayRunWithoutPTY(identity.Permissions{}, tt.kind, tt.payload); err != nil {
			t.Errorf("%s %q is refused although no terminal is required: %v", tt.kind, tt.payload, err)
		}
	}
	// One role is enough.
	roles := Roles{
		{Name: "a", Users: []string{"*"}, Permit: PermitAll()},
		{Name: "b", Users: []string{"alice"}, Permit: PermitAll(), RequirePTY: true},
	}
	for user, want := range map[string]bool{"alice": true, "bob": false} {
		if p, _, err := roles.Decide(Login{User: user, Key: identity.AllowAll()}); err != nil || p.RequirePTY != want {
			t.Errorf("%s: %v, %v", user, p.RequirePTY, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"db.internal:5432", "[2001:db8::/32]:443", "10.0.0.0/8:8000-8100", "*:*", "mon-fri 07:00-19:00 Europe/Berlin", "fri-mon 22:00-06:00", "10.0.0.1/8:1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, err := ParseDestination(s); err == nil {
			again, err := ParseDestination(d.String())
			if err != nil || again != d {
				t.Errorf("%q is %s, and that is %s: %v", s, d, again, err)
			}
			if strings.Contains(d.String(), ",") {
				t.Errorf("%q would be two rules in a certificate", s)
			}
		}
		if h, err := ParseHours(s); err == nil {
			open := false
			for at := monday; at.Before(monday.Add(7 * 24 * time.Hour)); at = at.Add(time.Minute) {
				open = open || h.Contain(at)
			}
			if !open {
				t.Errorf("%q is never", s)
			}
		}
	})
}
