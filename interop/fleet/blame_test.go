package main

import (
	"testing"
	"time"
)

func TestBlame(t *testing.T) {
	var b blame
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	for _, f := range []struct {
		kind        *kind
		gateway     int
		from, until int // until 0: it lasts
	}{
		{killed, 1, 100, 110},
		{cutTable, 2, 100, 110},
		{cutGateways, 3, 100, 500},
		{lostReplies, 0, 1000, 1010},
		{overloaded, 0, 1500, 1510},
		{upgraded, 1, 1800, 1810},
		{paused, 2, 2000, 0},
	} {
		made := b.begin(f.kind, f.gateway, at(f.from))
		if f.kind == upgraded {
			b.spare(made, at(f.from-20))
		}
		if f.until != 0 {
			b.end(made, at(f.until))
		}
	}
	for _, tt := range []struct {
		name         string
		gateway      int
		began, ended int
		login        bool // the refusal of a login is explained
		session      bool // the end of a session at ended is
	}{
		{"before the fault", 1, 80, 90, false, false},
		{"begun before it and ended in it", 1, 80, 101, true, true},
		{"begun in it", 1, 105, 300, true, false},
		{"after it, within its grace", 1, 120, 121, true, true},
		{"after its grace", 1, 126, 130, false, false},
		{"another gateway", 3, 105, 106, false, false},
		{"no gateway", 0, 105, 106, false, false},
		{"a fault without effect on sessions", 2, 105, 106, true, false},
		{"a fault of all gateways", 3, 1005, 1006, true, false},
		{"an overloaded machine", 0, 1505, 1506, true, true},
		{"an old process, before its end", 1, 1700, 1799, false, false},
		{"an old process, at its end", 1, 1700, 1805, true, true},
		{"its successor", 1, 1795, 1805, false, false},
		{"a fault that lasts", 2, 9000, 9001, true, true},
	} {
		if got := b.login(tt.gateway, at(tt.began), at(tt.ended)) != nil; got != tt.login {
			t.Errorf("%s: login explained: %v", tt.name, got)
		}
		if got := b.session(tt.gateway, at(tt.began), at(tt.ended)) != nil; got != tt.session {
			t.Errorf("%s: session explained: %v", tt.name, got)
		}
	}
}
