//! What controllers and the scheduler stand on: shared informers, work queues, event recording, label selectors and
//! resource quantities. It owns no controller and decides nothing about any kind.

