//! What is to become of a Service's EndpointSlices, and the requests that make it so.

use std::sync::Arc;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt};
use oarlock_machinery::{ApiError, Key, call};

use super::echo::Echoes;
use crate::shared::Shared;

/// Slices of one Service that are to be written.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub create: Vec<EndpointSlice>,
    pub update: Vec<EndpointSlice>,
    pub delete: Vec<Arc<EndpointSlice>>,
}

impl Plan {
    /// All of them go.
    pub(super) fn without(slices: Vec<Arc<EndpointSlice>>) -> Plan {
        Plan { delete: slices, ..Plan::default() }
    }

    /// Sends the requests, deletions last, and takes note in `written` of what its echo has yet to tell. Can be repeated from
    /// a new plan after an error.
    pub(super) async fn carry_out(self, shared: &Shared, service: &Key, written: &Echoes) -> Result<(), ApiError> {
        let api: Api<EndpointSlice> = Api::namespaced(shared.client.clone(), &service.namespace);
        for slice in self.create {
            match call("create endpointslice", api.create(&PostParams::default(), &slice)).await {
                Ok(created) => written.note(service, &created, &shared.endpoint_slices),
                Err(error) if error.is_namespace_terminating() => {}
                Err(error) => return Err(error),
            }
        }
        for slice in self.update {
            let replaced =
                call("replace endpointslice", api.replace(&slice.name_any(), &PostParams::default(), &slice)).await?;
            written.note(service, &replaced, &shared.endpoint_slices);
        }
        for slice in self.delete {
            let parameters =
                DeleteParams::default().preconditions(Preconditions { uid: slice.uid(), resource_version: None });
            match call("delete endpointslice", api.delete(&slice.name_any(), &parameters)).await {
                Err(error) if error.is_not_found() || error.is_conflict() => {}
                result => drop(result?),
            }
        }
        Ok(())
    }
}
