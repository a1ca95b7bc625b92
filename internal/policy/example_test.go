package policy_test

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/sallyport-ssh/sallyport/internal/identity"
	"github.com/sallyport-ssh/sallyport/internal/policy"
)

// Two roles, and three logins: a role must match the user, the network and the time.
func ExampleRoles_Decide() {
	workday, err := policy.ParseHours("mon-fri 08:00-18:00 Europe/Berlin")
	if err != nil {
		fmt.Println(err)
		return
	}
	database, err := policy.ParseDestination("db.internal:5432")
	if err != nil {
		fmt.Println(err)
		return
	}
	roles := policy.Roles{
		{
			Name: "developer", Users: []string{"alice", "bob"}, Hours: []policy.Hours{workday},
			Permit: policy.PermitAll(), Destinations: []policy.Destination{database},
		},
		{Name: "auditor", Users: []string{"bob"}, Permit: policy.Permit{SFTP: true}},
	}
	for _, login := range []policy.Login{
		{User: "alice", Now: time.Date(2026, 6, 15, 12, 0, 0, 0, time.UTC)}, // a Monday
		{User: "alice", Now: time.Date(2026, 6, 14, 12, 0, 0, 0, time.UTC)},
		{User: "bob", Now: time.Date(2026, 6, 14, 12, 0, 0, 0, time.UTC)},
	} {
		login.From = netip.MustParseAddr("192.0.2.7")
		login.Key = identity.AllowAll()
		permissions, _, err := roles.Decide(login)
		if err != nil {
			fmt.Printf("%s is refused: %v\n", login.User, err)
			continue
		}
		fmt.Printf("%s has %v: shell %t, sftp %t\n", login.User, permissions.Roles, !permissions.NoShell, !permissions.NoSFTP)
	}
	// Output:
	// alice has [developer]: shell true, sftp true
	// alice is refused: no role may be used at this time: developer
	// bob has [auditor]: shell false, sftp true
}

// The gateway decides about the name that the client asked for. The agent, which has
// resolved the name, decides about the address.
func ExampleMayOpen() {
	p := identity.AllowAll()
	p.Roles = []string{"developer"}
	p.Destinations = []string{"*.internal:5432", "10.0.0.0/8:80"}
	fmt.Println(policy.MayOpen(p, "db.internal", 5432))
	fmt.Println(policy.MayOpen(p, "db.internal", 22))

	isOwn := func(netip.Addr) bool { return false }
	fmt.Println(policy.MayConnect(p, "db.internal", netip.MustParseAddr("10.1.2.3"), 5432, isOwn))
	fmt.Println(policy.MayConnect(p, "evil.internal", netip.MustParseAddr("127.0.0.1"), 5432, isOwn))
	// Output:
	// <nil>
	// the destinations of role developer do not permit db.internal:22
	// <nil>
	// the destinations of role developer do not permit 127.0.0.1:5432, which evil.internal stands for
}
