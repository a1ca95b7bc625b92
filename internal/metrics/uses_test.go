package metrics

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"go.yaml.in/yaml/v4"
)

const (
	alertsFile     = "../../deploy/prometheus/alerts.yaml"
	alertTestsFile = "../../deploy/prometheus/alerts_test.yaml"
	dashboardFile  = "../../deploy/grafana/sallyport.json"
)

func readYAML(t *testing.T, path string, into any) {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, into); err != nil {
		t.Fatal(err)
	}
}

// alerts returns the expressions of the alerting rules, by name.
func alerts(t *testing.T) map[string]string {
	var file struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	readYAML(t, alertsFile, &file)
	all := map[string]string{}
	for _, group := range file.Groups {
		for _, rule := range group.Rules {
			all[rule.Alert] = rule.Expr
		}
	}
	return all
}

// queries returns the queries of the dashboard, by the title of their panel.
func queries(t *testing.T) map[string][]string {
	text, err := os.ReadFile(dashboardFile)
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct {
			List []struct{ Name, Type, Query string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			all[panel.Title] = append(all[panel.Title], target.Expr)
		}
	}
	for _, variable := range dashboard.Templating.List {
		if variable.Type == "query" {
			all["$"+variable.Name] = []string{variable.Query}
		}
	}
	return all
}

var (
	series  = regexp.MustCompile(`\b((?:sallyport|process|go)_[a-z0-9_]+)\b(?:\{([^}]*)\})?`)
	matcher = regexp.MustCompile(`([a-z_]+)(=~|!~|!=|=)"([^"]*)"`)
	grouped = regexp.MustCompile(`\b(?:by|on) \(([^)]*)\)`)
)

// TestUses: the dashboard and the alerting rules name only metrics, labels and values of
// labels that exist.
func TestUses(t *testing.T) {
	all, err := full().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]*dto.MetricFamily{}
	values := map[string]map[string]bool{"instance": {}, "job": {}, "le": {}} // by label; the scraper adds these
	for _, f := range all {
		known[f.GetName()] = f
		if f.GetType() == dto.MetricType_HISTOGRAM {
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				known[f.GetName()+suffix] = f
			}
		}
		for _, m := range f.Metric {
			for _, l := range m.Label {
				if values[l.GetName()] == nil {
					values[l.GetName()] = map[string]bool{}
				}
				values[l.GetName()][l.GetValue()] = true
			}
		}
	}
	check := func(where, query string) {
		names := series.FindAllStringSubmatch(query, -1)
		if len(names) == 0 {
			t.Errorf("%s: no metric in %s", where, query)
		}
		for _, name := range names {
			f := known[name[1]]
			if f == nil {
				t.Errorf("%s: there is no metric %s", where, name[1])
				continue
			}
			for _, m := range matcher.FindAllStringSubmatch(name[2], -1) {
				has := slices.ContainsFunc(f.Metric[0].Label, func(l *dto.LabelPair) bool { return l.GetName() == m[1] })
				if !has && m[1] != "instance" {
					t.Errorf("%s: %s has no label %s", where, name[1], m[1])
				}
				for value := range strings.SplitSeq(m[3], "|") {
					if value != "$instance" && !values[m[1]][value] {
						t.Errorf("%s: %s of %s is never %q", where, m[1], name[1], value)
					}
				}
			}
		}
		for _, by := range grouped.FindAllStringSubmatch(query, -1) {
			for label := range strings.SplitSeq(by[1], ", ") {
				if values[label] == nil {
					t.Errorf("%s: no metric has a label %s", where, label)
				}
			}
		}
	}
	for name, expr := range alerts(t) {
		check(name, expr)
	}
	used := ""
	for panel, exprs := range queries(t) {
		for _, expr := range exprs {
			check(panel, expr)
			used += expr + "\n"
		}
	}
	for _, f := range ours(t, full()) {
		if !strings.Contains(used, f.GetName()) {
			t.Errorf("the dashboard does not show %s", f.GetName())
		}
	}
}

// TestAlertTests: each alert fires in one test of promtool, and does not in another.
func TestAlertTests(t *testing.T) {
	var file struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string
				ExpAlerts []any `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		}
	}
	readYAML(t, alertTestsFile, &file)
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range file.Tests {
		for _, at := range test.AlertRuleTest {
			if len(at.ExpAlerts) > 0 {
				fires[at.Alertname] = true
			} else {
				silent[at.Alertname] = true
			}
		}
	}
	names := slices.Sorted(maps.Keys(alerts(t)))
	if len(names) < 10 {
		t.Errorf("%d alerts", len(names))
	}
	for _, name := range names {
		if !fires[name] || !silent[name] {
			t.Errorf("%s: a test in which it fires: %v, one in which it does not: %v", name, fires[name], silent[name])
		}
	}
}
