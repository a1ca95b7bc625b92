package transport

// For tests of package transport_test.
var (
	Combinations = combinations
	TestHostKeys = hostKeys
)

func (cfg *Config) TestName() string { return cfg.testName() }
