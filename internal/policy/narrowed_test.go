package policy

import (
	"reflect"
	"testing"

	"github.com/sallyport-ssh/sallyport/internal/identity"
)

func TestNarrowed(t *testing.T) {
	type P = identity.Permissions
	list := func(entries ...string) []string { return entries }
	tests := []struct {
		name        string
		before, now P
		narrowed    bool
	}{
		{"the same", identity.AllowAll(), identity.AllowAll(), false},
		{"a right is gone", P{PTY: true}, P{}, true},
		{"a right is new", P{}, P{PTY: true}, false},
		{"a prohibition is new", P{}, P{NoExec: true}, true},
		{"a prohibition is gone", P{RequirePTY: true}, P{}, false},
		{"recorded from now on", P{}, P{Record: identity.RecordOutput}, true},
		{"recorded no more", P{Record: identity.RecordInput}, P{}, false},
		{"a limit of destinations is new", P{}, P{Destinations: list("db:5432")}, true},
		{"a destination is gone", P{Destinations: list("a:1", "b:1")}, P{Destinations: list("a:1")}, true},
		{"a destination is new", P{Destinations: list("a:1")}, P{Destinations: list("a:1", "b:1")}, false},
		{"the first destination", P{Destinations: list("none")}, P{Destinations: list("a:1")}, false},
		{"the last destination is gone", P{Destinations: list("a:1")}, P{Destinations: list("none")}, true},
		{"listeners without limit", P{Listen: list("8080")}, P{}, false},
		{"a limit of listeners is new", P{}, P{Listen: list("none")}, true},
		{"another role of the same rights", P{PTY: true, Roles: list("a")}, P{PTY: true, Roles: list("b")}, false},
		{"limits are for later logins", P{}, P{Limits: identity.Limits{Sessions: 1}}, false},
	}
	for _, tt := range tests {
		if err := Narrowed(tt.before, tt.now); (err != nil) != tt.narrowed {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestNarrowedKnowsAllRights fails when a permission is added that Narrowed does
// not look at.
func TestNarrowedKnowsAllRights(t *testing.T) {
	typ := reflect.TypeFor[identity.Permissions]()
	for i := range typ.NumField() {
		field := typ.Field(i)
		if field.Type.Kind() != reflect.Bool {
			continue
		}
		var with identity.Permissions
		reflect.ValueOf(&with).Elem().Field(i).SetBool(true)
		if Narrowed(with, identity.Permissions{}) == nil && Narrowed(identity.Permissions{}, with) == nil {
			t.Errorf("%s is not compared", field.Name)
		}
	}
}
