// Stubprovider is a provider of Terraform for tests only: it has the resources of the
// AWS provider that deploy/terraform uses, with their attributes and types (schema.json),
// and calls nothing. So terraform can validate, plan and test the module where the AWS
// provider cannot be downloaded, and without an account. Rules of the AWS provider beyond
// types, such as permitted values, are not checked.
package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"fmt"
	"log"
	"maps"
	"math/big"
	"strings"

	"github.com/hashicorp/terraform-plugin-go/tfprotov6"
	"github.com/hashicorp/terraform-plugin-go/tfprotov6/tf6server"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

//go:embed schema.json
var schemaJSON []byte

// A block is as schema.mjs writes it.
type block struct {
	Attributes map[string]attribute
	Blocks     map[string]nested
}

type attribute struct {
	Type                         typeName
	Required, Optional, Computed bool
	WriteOnly                    bool `json:"write_only"`
}

type nested struct {
	Nesting  string
	Min, Max int64
	Block    block
}

// A typeName is "string", "number", "bool" or "dynamic", or a list of a collection and one
// of these.
type typeName struct{ tftypes.Type }

func (n *typeName) UnmarshalJSON(text []byte) error {
	simple := map[string]tftypes.Type{"string": tftypes.String, "number": tftypes.Number, "bool": tftypes.Bool, "dynamic": tftypes.DynamicPseudoType}
	var one string
	if json.Unmarshal(text, &one) == nil {
		n.Type = simple[one]
		return nil
	}
	var two [2]string
	if err := json.Unmarshal(text, &two); err != nil {
		return err
	}
	switch element := simple[two[1]]; two[0] {
	case "list":
		n.Type = tftypes.List{ElementType: element}
	case "set":
		n.Type = tftypes.Set{ElementType: element}
	case "map":
		n.Type = tftypes.Map{ElementType: element}
	default:
		return fmt.Errorf("unknown collection %s", two[0])
	}
	return nil
}

func (b block) schema() *tfprotov6.Schema { return &tfprotov6.Schema{Block: b.protocol()} }

func (b block) protocol() *tfprotov6.SchemaBlock {
	out := &tfprotov6.SchemaBlock{}
	for name, a := range b.Attributes {
		out.Attributes = append(out.Attributes, &tfprotov6.SchemaAttribute{
			Name: name, Type: a.Type.Type, Required: a.Required, Optional: a.Optional, Computed: a.Computed, WriteOnly: a.WriteOnly,
		})
	}
	nesting := map[string]tfprotov6.SchemaNestedBlockNestingMode{
		"list": tfprotov6.SchemaNestedBlockNestingModeList, "set": tfprotov6.SchemaNestedBlockNestingModeSet,
		"map": tfprotov6.SchemaNestedBlockNestingModeMap, "struct": tfprotov6.SchemaNestedBlockNestingModeSingle,
	}
	for name, n := range b.Blocks {
		child := &tfprotov6.SchemaNestedBlock{TypeName: name, Block: n.Block.protocol(), Nesting: nesting[n.Nesting], MinItems: n.Min, MaxItems: n.Max}
		if n.Nesting == "struct" {
			child.MinItems, child.MaxItems = 0, 0
		}
		out.BlockTypes = append(out.BlockTypes, child)
	}
	return out
}

// A provider implements tfprotov6.ProviderServer. The embedded interface has the calls
// that terraform does not make for this schema.
type provider struct {
	tfprotov6.ProviderServer
	Resource, Data map[string]block
}

var settings = block{
	Attributes: map[string]attribute{"region": {Type: typeName{tftypes.String}, Optional: true}},
	Blocks: map[string]nested{"default_tags": {Nesting: "list", Max: 1, Block: block{
		Attributes: map[string]attribute{"tags": {Type: typeName{tftypes.Map{ElementType: tftypes.String}}, Optional: true}},
	}}},
}

func (p provider) GetMetadata(context.Context, *tfprotov6.GetMetadataRequest) (*tfprotov6.GetMetadataResponse, error) {
	out := &tfprotov6.GetMetadataResponse{}
	for name := range p.Resource {
		out.Resources = append(out.Resources, tfprotov6.ResourceMetadata{TypeName: name})
	}
	for name := range p.Data {
		out.DataSources = append(out.DataSources, tfprotov6.DataSourceMetadata{TypeName: name})
	}
	return out, nil
}

func (p provider) GetProviderSchema(context.Context, *tfprotov6.GetProviderSchemaRequest) (*tfprotov6.GetProviderSchemaResponse, error) {
	out := &tfprotov6.GetProviderSchemaResponse{
		Provider: settings.schema(), ResourceSchemas: map[string]*tfprotov6.Schema{}, DataSourceSchemas: map[string]*tfprotov6.Schema{},
	}
	for name, b := range p.Resource {
		out.ResourceSchemas[name] = b.schema()
	}
	for name, b := range p.Data {
		out.DataSourceSchemas[name] = b.schema()
	}
	return out, nil
}

func (p provider) GetResourceIdentitySchemas(context.Context, *tfprotov6.GetResourceIdentitySchemasRequest) (*tfprotov6.GetResourceIdentitySchemasResponse, error) {
	return &tfprotov6.GetResourceIdentitySchemasResponse{}, nil
}

func (p provider) ValidateProviderConfig(_ context.Context, r *tfprotov6.ValidateProviderConfigRequest) (*tfprotov6.ValidateProviderConfigResponse, error) {
	return &tfprotov6.ValidateProviderConfigResponse{PreparedConfig: r.Config}, nil
}

func (p provider) ConfigureProvider(context.Context, *tfprotov6.ConfigureProviderRequest) (*tfprotov6.ConfigureProviderResponse, error) {
	return &tfprotov6.ConfigureProviderResponse{}, nil
}

func (p provider) StopProvider(context.Context, *tfprotov6.StopProviderRequest) (*tfprotov6.StopProviderResponse, error) {
	return &tfprotov6.StopProviderResponse{}, nil
}

func (p provider) ValidateResourceConfig(context.Context, *tfprotov6.ValidateResourceConfigRequest) (*tfprotov6.ValidateResourceConfigResponse, error) {
	return &tfprotov6.ValidateResourceConfigResponse{}, nil
}

func (p provider) ValidateDataResourceConfig(context.Context, *tfprotov6.ValidateDataResourceConfigRequest) (*tfprotov6.ValidateDataResourceConfigResponse, error) {
	return &tfprotov6.ValidateDataResourceConfigResponse{}, nil
}

// PlanResourceChange plans the configuration; attributes that only AWS can tell are
// unknown.
func (p provider) PlanResourceChange(_ context.Context, r *tfprotov6.PlanResourceChangeRequest) (*tfprotov6.PlanResourceChangeResponse, error) {
	b := p.Resource[r.TypeName]
	planned, err := b.edit(r.ProposedNewState, func(name string, a attribute, v tftypes.Value, _ func(string) string) tftypes.Value {
		switch {
		case a.WriteOnly:
			return tftypes.NewValue(a.Type.Type, nil)
		case v.IsNull() && a.Computed && (!a.Optional || name == "id"):
			return tftypes.NewValue(a.Type.Type, tftypes.UnknownValue)
		}
		return v
	})
	if err != nil {
		return nil, fmt.Errorf("planning %s: %w", r.TypeName, err)
	}
	return &tfprotov6.PlanResourceChangeResponse{PlannedState: planned}, nil
}

// ApplyResourceChange makes up the attributes that are unknown. Ids and ARNs that the
// gateway's configuration has look like those of AWS.
func (p provider) ApplyResourceChange(_ context.Context, r *tfprotov6.ApplyResourceChangeRequest) (*tfprotov6.ApplyResourceChangeResponse, error) {
	b := p.Resource[r.TypeName]
	kind := strings.TrimPrefix(r.TypeName, "aws_")
	hash := fmt.Sprintf("%x", sha256.Sum256(append([]byte(r.TypeName), r.PlannedState.MsgPack...)))[:17]
	prefix := map[string]string{"security_group": "sg", "subnet": "subnet", "vpc": "vpc"}[kind]
	if prefix == "" {
		prefix = kind
	}
	state, err := b.edit(r.PlannedState, func(name string, a attribute, v tftypes.Value, text func(string) string) tftypes.Value {
		if v.IsFullyKnown() {
			return v
		}
		made := kind + "-" + name
		switch {
		case name == "id":
			made = prefix + "-" + hash
		case name == "arn" && kind == "ecs_task_definition":
			made = arn + ":ecs:" + region + ":" + account + ":task-definition/" + text("family") + ":1"
		case name == "arn" && kind == "iam_role":
			made = arn + ":iam::" + account + ":role/" + text("name")
		case name == "arn":
			made = arn + ":stub:" + region + ":" + account + ":" + kind + "/" + hash
		}
		return invented(made, a.Type.Type)
	})
	if err != nil {
		return nil, fmt.Errorf("applying %s: %w", r.TypeName, err)
	}
	return &tfprotov6.ApplyResourceChangeResponse{NewState: state}, nil
}

// The account of the tests.
const (
	arn     = "arn:aws"
	region  = "eu-west-1"
	account = "123456789012"
)

func (p provider) ReadResource(_ context.Context, r *tfprotov6.ReadResourceRequest) (*tfprotov6.ReadResourceResponse, error) {
	return &tfprotov6.ReadResourceResponse{NewState: r.CurrentState}, nil
}

func (p provider) UpgradeResourceState(_ context.Context, r *tfprotov6.UpgradeResourceStateRequest) (*tfprotov6.UpgradeResourceStateResponse, error) {
	value, err := r.RawState.Unmarshal(p.Resource[r.TypeName].schema().ValueType())
	if err != nil {
		return nil, err
	}
	state, err := tfprotov6.NewDynamicValue(value.Type(), value)
	return &tfprotov6.UpgradeResourceStateResponse{UpgradedState: &state}, err
}

// ReadDataSource makes up the attributes that are not given, those of known as AWS has
// them.
func (p provider) ReadDataSource(_ context.Context, r *tfprotov6.ReadDataSourceRequest) (*tfprotov6.ReadDataSourceResponse, error) {
	known := map[string]string{
		"aws_region.region":              region,
		"aws_caller_identity.account_id": account,
		"aws_partition.partition":        "aws",
	}
	b := p.Data[r.TypeName]
	state, err := b.edit(r.Config, func(name string, a attribute, v tftypes.Value, text func(string) string) tftypes.Value {
		if value, ok := known[r.TypeName+"."+name]; ok {
			return tftypes.NewValue(tftypes.String, value)
		}
		if !v.IsNull() || !a.Computed {
			return v
		}
		if r.TypeName == "aws_subnet" && name == "cidr_block" {
			return tftypes.NewValue(tftypes.String, fmt.Sprintf("10.0.%d.0/24", sum(text("id"))))
		}
		return invented(r.TypeName+"-"+name, a.Type.Type)
	})
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", r.TypeName, err)
	}
	return &tfprotov6.ReadDataSourceResponse{State: state}, nil
}

// sum returns a number from 0 to 255 for a text.
func sum(text string) int {
	n := 0
	for _, c := range []byte(text) {
		n = (n*31 + int(c)) % 256
	}
	return n
}

// invented returns a value of a type: text, 0, false, or an empty collection.
func invented(text string, t tftypes.Type) tftypes.Value {
	switch {
	case t.Is(tftypes.String):
		return tftypes.NewValue(t, text)
	case t.Is(tftypes.Number):
		return tftypes.NewValue(t, big.NewFloat(0))
	case t.Is(tftypes.Bool):
		return tftypes.NewValue(t, false)
	case t.Is(tftypes.Map{}):
		return tftypes.NewValue(t, map[string]tftypes.Value{})
	case t.Is(tftypes.DynamicPseudoType):
		return tftypes.NewValue(tftypes.String, text)
	}
	return tftypes.NewValue(t, []tftypes.Value{})
}

// edit calls change for each attribute of the object, and returns it with the results.
// text returns an attribute's text before the changes. Blocks are left alone. A null
// object is returned as it is.
func (b block) edit(object *tfprotov6.DynamicValue, change func(name string, a attribute, v tftypes.Value, text func(string) string) tftypes.Value) (*tfprotov6.DynamicValue, error) {
	t := b.schema().ValueType()
	value, err := object.Unmarshal(t)
	if err != nil || value.IsNull() {
		return object, err
	}
	var before map[string]tftypes.Value
	if err := value.As(&before); err != nil {
		return nil, err
	}
	text := func(name string) string {
		var s string
		if v := before[name]; v.IsKnown() && !v.IsNull() {
			v.As(&s)
		}
		return s
	}
	after := maps.Clone(before)
	for name, a := range b.Attributes {
		after[name] = change(name, a, before[name], text)
	}
	out, err := tfprotov6.NewDynamicValue(t, tftypes.NewValue(t, after))
	return &out, err
}

func main() {
	var p provider
	if err := json.Unmarshal(schemaJSON, &p); err != nil {
		log.Fatal(err)
	}
	err := tf6server.Serve("registry.terraform.io/hashicorp/aws", func() tfprotov6.ProviderServer { return p })
	if err != nil {
		log.Fatal(err)
	}
}
