//! The events that plugins subscribe to, and the mask that they do it with.

use crate::api;

/// Something that happens to a pod or a container and asks for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    RunPodSandbox,
    PostUpdatePodSandbox,
    StopPodSandbox,
    RemovePodSandbox,
    PostCreateContainer,
    StartContainer,
    PostStartContainer,
    PostUpdateContainer,
    RemoveContainer,
}

impl Event {
    pub(crate) fn on_the_wire(self) -> api::Event {
        match self {
            Event::RunPodSandbox => api::Event::RunPodSandbox,
            Event::PostUpdatePodSandbox => api::Event::PostUpdatePodSandbox,
            Event::StopPodSandbox => api::Event::StopPodSandbox,
            Event::RemovePodSandbox => api::Event::RemovePodSandbox,
            Event::PostCreateContainer => api::Event::PostCreateContainer,
            Event::StartContainer => api::Event::StartContainer,
            Event::PostStartContainer => api::Event::PostStartContainer,
            Event::PostUpdateContainer => api::Event::PostUpdateContainer,
            Event::RemoveContainer => api::Event::RemoveContainer,
        }
    }

    /// The call that tells of it.
    pub(crate) fn call(self) -> &'static str {
        match self {
            Event::RunPodSandbox => "RunPodSandbox",
            Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
            Event::StopPodSandbox => "StopPodSandbox",
            Event::RemovePodSandbox => "RemovePodSandbox",
            Event::PostCreateContainer => "PostCreateContainer",
            Event::StartContainer => "StartContainer",
            Event::PostStartContainer => "PostStartContainer",
            Event::PostUpdateContainer => "PostUpdateContainer",
            Event::RemoveContainer => "RemoveContainer",
        }
    }
}

/// The events that a plugin subscribed to, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mask(i32);

impl Mask {
    pub(crate) const ALL: Mask = Mask((1 << (api::Event::Last as i32 - 1)) - 1);

    /// A plugin that names no event means all; one that names an event that does not exist is told which.
    pub(crate) fn of(events: i32) -> Result<Mask, i32> {
        match events {
            0 => Ok(Mask::ALL),
            events if events & !Mask::ALL.0 != 0 => Err(events & !Mask::ALL.0),
            events => Ok(Mask(events)),
        }
    }

    pub(crate) fn has(self, event: api::Event) -> bool {
        self.0 & (1 << (event as i32 - 1)) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_event_is_every_event_and_one_that_does_not_exist_is_told() {
        let all = Mask::of(0).unwrap();
        assert!(all.has(api::Event::RunPodSandbox) && all.has(api::Event::ValidateContainerAdjustment));
        let one = Mask::of(1 << 3).unwrap();
        assert!(one.has(api::Event::CreateContainer) && !one.has(api::Event::RunPodSandbox));
        assert_eq!(Mask::of((1 << 14) | 1), Err(1 << 14));
    }
}
