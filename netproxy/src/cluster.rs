//! The Services and EndpointSlices of the cluster as they are now, for packets and for names.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::service::{Service, ServiceName, Shape, Slice};

/// A slice by namespace and name.
pub type SliceName = (Arc<str>, Arc<str>);

/// The state that the watches have built.
#[derive(Debug, Default)]
pub struct Cluster {
    services: HashMap<ServiceName, Service>,
    /// The slices of each Service, by name.
    slices: HashMap<ServiceName, Vec<Slice>>,
    owners: HashMap<SliceName, ServiceName>,
    /// Services with this address: as their own, or of an endpoint of a headless one.
    by_address: HashMap<IpAddr, Vec<ServiceName>>,
    namespaces: HashMap<Arc<str>, usize>,
    is_listed: bool,
}

impl Cluster {
    /// Takes a Service in, or out, and says whether anything changed.
    pub fn set_service(&mut self, name: &ServiceName, mut service: Option<Service>) -> bool {
        if self.services.get(name) == service.as_ref() {
            return false;
        }
        let name = &self.interned(name);
        if let Some(service) = &mut service {
            service.name = name.clone();
        }
        self.unindex(name);
        let existed = match service {
            Some(service) => self.services.insert(name.clone(), service).is_some(),
            None => self.services.remove(name).is_some(),
        };
        let exists = self.services.contains_key(name);
        if exists && !existed {
            *self.namespaces.entry(name.namespace.clone()).or_default() += 1;
        } else if existed
            && !exists
            && let Some(count) = self.namespaces.get_mut(&name.namespace)
        {
            *count -= 1;
            if *count == 0 {
                self.namespaces.remove(&name.namespace);
            }
        }
        self.index(name);
        true
    }

    /// Takes a slice in, or out, and adds the Services that it changes to `changed`. Says whether it is another than before.
    pub fn set_slice(&mut self, name: &SliceName, slice: Option<Slice>, changed: &mut HashSet<ServiceName>) -> bool {
        let old_owner = self.owners.get(name).cloned();
        let new_owner = slice.as_ref().map(|slice| slice.service.clone());
        if let (Some(old), Some(new), Some(slice)) = (&old_owner, &new_owner, &slice)
            && old == new
            && self.slices(old).any(|known| known == slice)
        {
            return false;
        }
        for owner in old_owner.iter().chain(new_owner.iter()) {
            self.unindex(owner);
        }
        if let Some(owner) = &old_owner {
            if let Some(slices) = self.slices.get_mut(owner) {
                slices.retain(|known| known.name != name.1);
                if slices.is_empty() {
                    self.slices.remove(owner);
                }
            }
            self.owners.remove(name);
        }
        if let (Some(owner), Some(mut slice)) = (&new_owner, slice) {
            let owner = self.interned(owner);
            slice.service = owner.clone();
            let name = (owner.namespace.clone(), slice.name.clone());
            // Nearly every Service has one slice for each family, so there is no room for more.
            let slices = self.slices.entry(owner.clone()).or_insert_with(|| Vec::with_capacity(1));
            let position = slices.partition_point(|known| known.name < slice.name);
            slices.insert(position, slice);
            self.owners.insert(name, owner);
        }
        let mut touched: Vec<ServiceName> = old_owner.into_iter().chain(new_owner).collect();
        touched.dedup();
        let is_other = !touched.is_empty();
        for owner in touched {
            self.index(&owner);
            changed.insert(owner);
        }
        is_other
    }

    /// All Services and slices that exist have been taken in: what is not here is nowhere.
    pub fn set_listed(&mut self) {
        self.is_listed = true;
    }

    pub fn is_listed(&self) -> bool {
        self.is_listed
    }

    pub fn service(&self, name: &ServiceName) -> Option<&Service> {
        self.services.get(name)
    }

    pub fn slices(&self, name: &ServiceName) -> impl Iterator<Item = &Slice> {
        self.slices.get(name).into_iter().flatten()
    }

    /// Whether some Service is in a namespace.
    pub fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace)
    }

    /// The Services that have an address, or an endpoint with it if they are headless.
    pub fn services_at(&self, address: IpAddr) -> &[ServiceName] {
        self.by_address.get(&address).map(Vec::as_slice).unwrap_or_default()
    }

    /// The names of all Services.
    pub fn names(&self) -> impl Iterator<Item = ServiceName> {
        self.services.keys().cloned()
    }

    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// The same name, sharing its text with what is known already: there are tens of thousands.
    fn interned(&self, name: &ServiceName) -> ServiceName {
        if let Some((known, _)) = self.services.get_key_value(name) {
            return known.clone();
        }
        if let Some((known, _)) = self.slices.get_key_value(name) {
            return known.clone();
        }
        match self.namespaces.get_key_value(&name.namespace) {
            Some((namespace, _)) => ServiceName { namespace: namespace.clone(), name: name.name.clone() },
            None => name.clone(),
        }
    }

    fn addresses_of(&self, name: &ServiceName) -> Vec<IpAddr> {
        match self.services.get(name).map(|service| &service.shape) {
            Some(Shape::Virtual(addresses)) => addresses.to_vec(),
            Some(Shape::Headless) => {
                let endpoints = self.slices(name).flat_map(|slice| &slice.endpoints);
                let mut addresses: Vec<IpAddr> = endpoints.map(|endpoint| endpoint.address).collect();
                addresses.sort();
                addresses.dedup();
                addresses
            }
            _ => Vec::new(),
        }
    }

    fn index(&mut self, name: &ServiceName) {
        for address in self.addresses_of(name) {
            self.by_address.entry(address).or_insert_with(|| Vec::with_capacity(1)).push(name.clone());
        }
    }

    fn unindex(&mut self, name: &ServiceName) {
        for address in self.addresses_of(name) {
            if let Some(names) = self.by_address.get_mut(&address) {
                names.retain(|one| one != name);
                if names.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
    }
}
