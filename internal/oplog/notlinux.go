//go:build !linux

package oplog

// Both programs import this package, so a build for another system says this.
var _ int = "Sallyport runs on Linux only; build it with GOOS=linux"
