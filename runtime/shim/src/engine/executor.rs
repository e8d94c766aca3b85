//! How a container's own program is found and executed: with default `PATH`, by the permissions of the very user, and
//! with the words that users of other runtimes know.
//!
//! The last steps before it are taken here and not by the engine, which would compile the seccomp filter anew each time:
//!
//! ```text
//! engine: namespaces, root, user, all capabilities kept ─▶ filter ─▶ capabilities ─▶ program found ─▶ ready, waits
//!                                  (with no_new_privs the filter comes last) ─▶ started ─▶ filter ─▶ program
//! ```

use std::collections::HashMap;
use std::rc::Rc;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};

use oci_spec::runtime::LinuxCapabilities;

use crate::exec::{credentials, lookup};
use crate::seccomp;

/// Marks a lookup failure inside the engine's error text, which is all that crosses its processes.
pub(super) const NOT_FOUND_MARK: &str = "[127]";
/// As above, for a program that exists but may not be executed.
pub(super) const NOT_EXECUTABLE_MARK: &str = "[126]";

/// What binds the program beyond what the engine does.
#[derive(Debug)]
pub(super) struct Confinement {
    pub(super) filter: seccomp::Program,
    /// None: what the kernel leaves to the user.
    pub(super) capabilities: Option<LinuxCapabilities>,
    pub(super) no_new_privileges: bool,
}

impl Confinement {
    /// While this process still may: without no_new_privs loading a filter takes a capability.
    fn early(&self) -> Result<(), ExecutorValidationError> {
        let failed = |error: &dyn std::error::Error| ExecutorValidationError::ArgValidationError(super::chain(error));
        if !self.no_new_privileges {
            seccomp::load(&self.filter).map_err(|error| failed(&error))?;
        }
        self.capabilities.as_ref().map_or(Ok(()), credentials::limit_capabilities).map_err(|error| failed(&error))
    }

    /// Between the start and the program.
    fn late(&self) -> Result<(), ExecutorError> {
        if !self.no_new_privileges {
            return Ok(());
        }
        seccomp::load(&self.filter).map_err(|error| ExecutorError::Other(super::chain(&error)))
    }
}

/// None in it: the engine does all.
#[derive(Debug, Clone, Default)]
pub(super) struct Program(pub(super) Option<Rc<Confinement>>);

impl Executor for Program {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        if let Some(confinement) = &self.0 {
            confinement.early()?;
        }
        let (args, env) = command(spec);
        let name = args.first().map_or("", String::as_str);
        lookup::find(name, &env).map(drop).map_err(|error| {
            let mark = if error.is_not_found() { NOT_FOUND_MARK } else { NOT_EXECUTABLE_MARK };
            ExecutorValidationError::ArgValidationError(format!("{mark}{error}"))
        })
    }

    /// The environment goes to the program as the specification lists it, so the process's own stays as it is; all it
    /// gets is the HOME that was found for the user.
    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(home) = envs.get("HOME") {
            lookup::remember_home(home);
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (args, env) = command(spec);
        if let Some(confinement) = &self.0 {
            confinement.late()?;
        }
        // Only failures return. Standard error is the container's: that is where the user will look.
        let error = lookup::execute(&args, &env);
        eprintln!("{error}");
        Err(ExecutorError::Other(error.to_string()))
    }
}

fn command(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let process = spec.process().as_ref();
    let args = process.and_then(|process| process.args().clone()).unwrap_or_default();
    let env = process.and_then(|process| process.env().clone()).unwrap_or_default();
    (args, env)
}
