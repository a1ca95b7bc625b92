package config

import "regexp"

// A Ledger says where the gateway keeps which bastion is whose.
type Ledger struct {
	// Table is the name of a DynamoDB table that several gateways share. Empty,
	// the default, means the folder "ledger" in StateDir.
	Table string
}

// tableName is the pattern of names of DynamoDB tables ("Naming rules" in its
// developer guide).
var tableName = regexp.MustCompile(`^[A-Za-z0-9_.-]{3,255}$`)

// ledger reads the value of the key ledger.
func (v value) ledger(l *Ledger) {
	seen := v.mapping(map[string]func(value){
		"dynamodb": func(v value) {
			seen := v.mapping(map[string]func(value){
				"table": func(v value) {
					var ok bool
					if l.Table, ok = v.text(); ok && !tableName.MatchString(l.Table) {
						v.mistake("%q is not the name of a table; write 3 to 255 letters, digits, -, _ and .", l.Table)
						l.Table = ""
					}
				},
			})
			if !seen["table"] {
				v.mistake("names no table")
			}
		},
	})
	if !seen["dynamodb"] {
		v.mistake("names no ledger; write dynamodb: {table: NAME}, or leave ledger out for a folder in state_dir")
	}
}

// checkLedger reports profiles whose bastions other gateways cannot reach.
func (v value) checkLedger(g *Gateway) {
	if g.Ledger.Table == "" {
		return
	}
	for name, p := range g.Profiles {
		if p.Launcher == "local" {
			v.add(v.lineOf("ledger"), "ledger: is shared by several gateways, but bastions of the profile %s are processes on this one's machine; give it launcher: fargate", name)
		}
	}
}
