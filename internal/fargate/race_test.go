//go:build race

package fargate

const raceEnabled = true
