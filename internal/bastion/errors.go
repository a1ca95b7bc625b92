package bastion

import (
	"errors"
	"fmt"
)

// Errors of Launcher and Dialer wrap these where they apply. Package gateway
// chooses the user's sentence by them.
var (
	// ErrGone says that a task has ended, or never existed.
	ErrGone = errors.New("bastion is gone")
	// ErrNoAccount says that the user has no account on the machine that
	// would run the bastion.
	ErrNoAccount = errors.New("no account for this user")
	// ErrNoProfile says that no profile of that name is configured.
	ErrNoProfile = errors.New("no such profile")
	// ErrTimeout says that a bastion did not become reachable in time.
	ErrTimeout = errors.New("bastion did not start in time")
	// ErrNoAnswer says that a bastion does not answer although, as far as its
	// launcher knows, it runs.
	ErrNoAnswer = errors.New("bastion does not answer")
	// ErrHostKey says that the server at the bastion's address has another
	// host key.
	ErrHostKey = errors.New("bastion has the wrong host key")
	// ErrCapacity says that the platform has no capacity at the moment.
	ErrCapacity = errors.New("no capacity to start a bastion")
	// ErrQuota says that the platform's quota for the account is used up.
	ErrQuota = errors.New("the account's quota is used up")
	// ErrTooMany says that the user has the permitted number of bastions.
	ErrTooMany = errors.New("the user has as many bastions as permitted")
	// ErrBusy says that the platform throttles starts.
	ErrBusy = errors.New("too many starts at once")
	// ErrPlatform says that the platform did not provide the bastion's network
	// interface or disk in time.
	ErrPlatform = errors.New("the platform did not get ready")
	// ErrImage says that the bastion's image cannot be pulled.
	ErrImage = errors.New("the image cannot be pulled")
	// ErrSecrets says that secrets of the task definition cannot be read.
	ErrSecrets = errors.New("the secrets cannot be read")
	// ErrDenied says that the gateway lacks a permission.
	ErrDenied = errors.New("not permitted to start a bastion")
	// ErrConfig says that a resource of the profile's configuration does not
	// exist or does not fit.
	ErrConfig = errors.New("the profile does not fit")
	// ErrMemory, ErrInterrupted, ErrMaintenance and ErrStopped give the reason
	// for the end of a bastion, if its platform knows it; they come with
	// ErrGone. It ran out of memory, Fargate Spot took its capacity back, its
	// host needed maintenance, or it was stopped through the platform.
	ErrMemory      = errors.New("the bastion ran out of memory")
	ErrInterrupted = errors.New("the spare capacity was taken back")
	ErrMaintenance = errors.New("the platform ended it for maintenance")
	ErrStopped     = errors.New("it was stopped through the platform")
	// ErrStarting says that the bastion is being started or stopped.
	ErrStarting = errors.New("the bastion is being started or stopped")
	// ErrLedger says that the ledger cannot be read or changed.
	ErrLedger = errors.New("the ledger is out of reach")
	// ErrConflict is returned by Ledger.Swap if the entry has changed.
	ErrConflict = errors.New("ledger entry has changed")
)

// A GoneError is an ErrGone with the reason, if the launcher knows it.
type GoneError struct {
	TaskID string
	// Why is for the operator. It wraps ErrMemory and the like where they
	// apply.
	Why error
	// Usage is that of the task.
	Usage Usage
}

func (e *GoneError) Error() string { return fmt.Sprintf("task %s: %v: %v", e.TaskID, ErrGone, e.Why) }

func (e *GoneError) Unwrap() []error { return []error{ErrGone, e.Why} }

// whyGone returns the reason for the end of a task, for the operator, and its usage;
// both are empty if the launcher does not know them.
func whyGone(err error) (string, Usage) {
	var gone *GoneError
	if errors.As(err, &gone) {
		return gone.Why.Error(), gone.Usage
	}
	return "", Usage{}
}
