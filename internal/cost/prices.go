package cost

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
)

//go:embed prices.json
var builtin []byte

// Builtin returns the built-in table of prices as JSON, which ReadPrices reads. It
// also has those that docs/cost.md calculates with.
func Builtin() []byte { return bytes.Clone(builtin) }

// Prices is a table of prices in one Region.
type Prices struct {
	Region   string           `json:"region"`
	Currency string           `json:"currency"`
	Prices   map[string]Price `json:"prices"`
}

// A Price is the price of one unit.
type Price struct {
	Price float64 `json:"price"`
	Unit  string  `json:"unit,omitempty"`
	// Page is the pricing page, and AsOf the day, or the month, for which the price
	// is known to be right.
	Page string `json:"page,omitempty"`
	AsOf string `json:"as_of,omitempty"`
}

// DefaultPrices returns the built-in table.
func DefaultPrices() Prices {
	var p Prices
	if err := json.Unmarshal(builtin, &p); err != nil {
		panic(err) // a mistake in prices.json
	}
	return p
}

// The names of the prices of a bastion are vcpu and gb, with suffixes, and storage.
const (
	ofARM, ofSpot = "_arm", "_spot"
	storage       = "storage"

	// includedStorage is the disk of a task that is not billed, in GB.
	includedStorage = 20
)

const (
	maxPricesFile = 1 << 20 // bytes
	maxPrice      = 1e6
)

// billed are the names of all prices of bastions.
func billed() []string {
	names := []string{storage}
	for _, architecture := range []string{"", ofARM} {
		for _, capacity := range []string{"", ofSpot} {
			names = append(names, "vcpu"+architecture+capacity, "gb"+architecture+capacity)
		}
	}
	return names
}

// ReadPrices reads a table in the form of [Builtin]. Prices that it lacks are the
// built-in ones, if those are for the same Region and currency.
func ReadPrices(r io.Reader) (Prices, error) {
	var p Prices
	dec := json.NewDecoder(io.LimitReader(r, maxPricesFile))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		return Prices{}, err
	}
	known := DefaultPrices()
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(p.Prices)) {
		price := p.Prices[name].Price
		if _, ok := known.Prices[name]; !ok {
			problems = append(problems, fmt.Errorf("unknown price %q", name))
		} else if !(price >= 0) || price > maxPrice {
			problems = append(problems, fmt.Errorf("price %q: %g is out of range", name, price))
		}
	}
	p.Region, p.Currency = cmp.Or(p.Region, known.Region), cmp.Or(p.Currency, known.Currency)
	same := p.Region == known.Region && p.Currency == known.Currency
	for _, name := range billed() {
		if _, ok := p.Prices[name]; !ok && !same {
			problems = append(problems, fmt.Errorf("there is no price %q, and the built-in one is for %s in %s", name, known.Region, known.Currency))
		}
	}
	if len(problems) > 0 {
		return Prices{}, errors.Join(problems...)
	}
	if same {
		maps.Copy(known.Prices, p.Prices)
		p.Prices = known.Prices
	}
	return p, nil
}

// AsOf returns the dates of the prices of bastions, as text.
func (p Prices) AsOf() string {
	var dates []string
	for _, name := range billed() {
		dates = append(dates, cmp.Or(p.Prices[name].AsOf, "an unknown date"))
	}
	slices.Sort(dates)
	dates = slices.Compact(dates)
	if len(dates) > 2 {
		dates = []string{dates[0], dates[len(dates)-1]}
	}
	return strings.Join(dates, " to ")
}

// perHour returns the price of an hour of a bastion.
func (p Prices) perHour(s size) float64 {
	kind := ""
	if s.architecture == "arm64" {
		kind += ofARM
	}
	if s.spot {
		kind += ofSpot
	}
	disk := max(s.storage-includedStorage, 0)
	return s.vcpus()*p.Prices["vcpu"+kind].Price + s.gigabytes()*p.Prices["gb"+kind].Price + float64(disk)*p.Prices[storage].Price
}

// A size is what a bastion is billed for, per second.
type size struct {
	platform, architecture string
	spot                   bool
	cpu, memory, storage   int // units of 1/1024 vCPU, MiB, GiB
}

func (s size) vcpus() float64     { return float64(s.cpu) / 1024 }
func (s size) gigabytes() float64 { return float64(s.memory) / 1024 }

// known reports whether the size can be priced.
func (s size) known() bool { return s.platform == "fargate" && s.cpu > 0 && s.memory > 0 }

// round rounds an amount or a number of hours for output.
func round(x float64) float64 { return math.Round(x*1e6) / 1e6 }
